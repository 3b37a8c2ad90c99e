"""Base: teach a fresh model language, from raw text.

accelerate launch hfsft/base.py recipes/demo.yaml
"""

import sys

from hfsft.process import run_main


def main(*argv: str) -> None:
    """Train the base stage of a recipe; the command line is the recipe and its overrides."""
    from hfsft.recipe.loading import load_recipe  # here: signals are answered by now

    recipe = load_recipe(*argv, stage="base")
    stage = recipe.base

    # torch, transformers and trl take 4 s to import: a mistake in the recipe is reported before
    from hfsft.data.text import base_texts, load_text, text_length
    from hfsft.model.loading import build_model
    from hfsft.run.manifest import checkpoints
    from hfsft.tokens.tokenizer import base_tokenizer
    from hfsft.train.arguments import arguments, rows_per_step
    from hfsft.train.finishing import train_and_save
    from hfsft.train.stage import open_stage
    from hfsft.train.trainer import StageTrainer

    stage = open_stage(recipe, stage)
    if stage is None:
        return
    tokenizer = base_tokenizer(recipe, base_texts(stage), bool(checkpoints(stage.checkpoints)))
    train, held_out = load_text(recipe, tokenizer)
    length = text_length(recipe)
    rows = rows_per_step(stage, length)
    trainer = StageTrainer(
        stage,
        rows,
        length,
        model=build_model(recipe, tokenizer),
        args=arguments(stage, train, rows),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    train_and_save(trainer, recipe, stage)


if __name__ == "__main__":
    run_main(main, *sys.argv[1:])
