"""Short recipes for tests, and how a test loads them or gets their error."""

from pathlib import Path

import pytest

from hfsft.errors import RecipeError
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Recipe

# three lines, so that the line a test adds is line 4
SFT = "sft:\n  model_name_or_path: model\n  data: [identity]\n"
BASE = (
    "model: {depth: 2, vocab_size: 300, max_position_embeddings: 64}\n"
    "tokenizer: {train: true}\n"
    "base:\n  data: [facts]\n  max_steps: 3\n"
)
MID = "mid:\n  data: [identity]\n  max_steps: 3\n"


def load(text: str | bytes, *argv: str, stage: str | None = "sft") -> Recipe:
    """Load a recipe with that text, as the stage's script does."""
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml", *argv, stage=stage)


def message(text: str | bytes, *argv: str, stage: str | None = "sft") -> str:
    """The error message of a recipe that is refused."""
    with pytest.raises(RecipeError) as refused:
        load(text, *argv, stage=stage)
    shown = str(refused.value)
    assert shown.count("\n") <= 1
    assert len(shown) < 300
    return shown
