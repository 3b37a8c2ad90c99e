"""Mid: teach the base model the conversation format and tasks.

accelerate launch hfsft/mid.py recipes/demo.yaml
"""

import sys

from hfsft.process import run_main


def main(*argv: str) -> None:
    """Train the mid stage of a recipe; the command line is the recipe and its overrides."""
    from hfsft.recipe.loading import load_recipe  # here: signals are answered by now

    recipe = load_recipe(*argv, stage="mid")
    stage = recipe.mid

    # torch, transformers and trl take 4 s to import: a mistake in the recipe is reported before
    from hfsft.data.mixture import load_packed_conversations
    from hfsft.data.replay import load_general
    from hfsft.model.loading import load_model
    from hfsft.tokens.tokenizer import stage_tokenizer
    from hfsft.train.arguments import arguments, rows_per_step
    from hfsft.train.finishing import train_and_save
    from hfsft.train.stage import open_stage
    from hfsft.train.trainer import StageTrainer

    stage = open_stage(recipe, stage)
    if stage is None:
        return
    tokenizer = stage_tokenizer(recipe, stage)
    train, held_out = load_packed_conversations(stage, tokenizer)
    rows = rows_per_step(stage, stage.max_length)
    trainer = StageTrainer(
        stage,
        rows,
        stage.max_length,
        model=load_model(stage, tokenizer),
        args=arguments(stage, train, rows),
        train_dataset=train,
        eval_dataset=held_out,
        general=load_general(stage, tokenizer),
        processing_class=tokenizer,
    )
    train_and_save(trainer, recipe, stage)


if __name__ == "__main__":
    run_main(main, *sys.argv[1:])
