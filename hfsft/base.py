"""Base: teach a fresh model language, from raw text.

accelerate launch hfsft/base.py recipes/demo.yaml
"""

import gc
import sys

from hfsft.errors import run_main
from hfsft.recipe import load_recipe


def main(*argv: str) -> None:
    """Train the base stage of a recipe; the command line is the recipe and its overrides."""
    recipe = load_recipe(*argv, stage="base")
    stage = recipe.base

    # torch, transformers and trl take 4 s to import: a recipe's mistakes are answered before, and
    # 0.7 s of it would go into looking for garbage, which `open_stage` takes up again
    gc.disable()
    from hfsft.checkpoint import checkpoints
    from hfsft.corpus import base_texts, load_text, text_length
    from hfsft.model import build_model
    from hfsft.tokenizer import base_tokenizer
    from hfsft.trainer import StageTrainer
    from hfsft.training import (
        arguments,
        open_stage,
        rows_per_step,
        train_and_save,
    )

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
