"""SFT: teach the model the assistant's style, from conversations; 200 steps by default.

accelerate launch hfsft/sft.py recipes/fast.yaml
"""

import sys

from hfsft.process import run_main


def main(*argv: str) -> None:
    """Train the sft stage of a recipe; the command line is the recipe and its overrides."""
    from hfsft.recipe.loading import load_recipe  # here: signals are answered by now

    recipe = load_recipe(*argv, stage="sft")
    stage = recipe.sft

    # torch, transformers and trl take 4 s to import: a mistake in the recipe is reported before
    from hfsft.data.mixture import load_conversations
    from hfsft.data.replay import load_general
    from hfsft.model.loading import load_model
    from hfsft.tokens.tokenizer import stage_tokenizer
    from hfsft.train.arguments import arguments
    from hfsft.train.finishing import train_and_save
    from hfsft.train.stage import open_stage
    from hfsft.train.trainer import SFTStageTrainer

    stage = open_stage(recipe, stage)
    if stage is None:
        return
    tokenizer = stage_tokenizer(recipe, stage)
    train, held_out = load_conversations(stage, tokenizer)
    trainer = SFTStageTrainer(
        stage,
        stage.examples_per_step,
        stage.max_length,
        model=load_model(stage, tokenizer),
        args=arguments(stage, train, stage.examples_per_step),
        train_dataset=train,
        eval_dataset=held_out,
        general=load_general(stage, tokenizer),
        processing_class=tokenizer,
    )
    train_and_save(trainer, recipe, stage)


if __name__ == "__main__":
    run_main(main, *sys.argv[1:])
