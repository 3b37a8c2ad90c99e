"""docs/recipes.md is made from the declarations, and lists every key that hfsft declares."""

from pathlib import Path

from hfsft.recipe.key import declared_keys
from hfsft.recipe.reference import page
from hfsft.recipe.schema import Source, Stage
from hfsft.recipe.sections import LORA, MODEL, MODEL_CONFIG, TOKENIZER, TOP, UPSTREAM

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_is_up_to_date():
    """If this fails: python -m hfsft.recipe.reference > docs/recipes.md."""
    assert PAGE.read_text() == page()


def test_every_declared_key_is_in_the_page():
    text = PAGE.read_text()
    tables = (TOP, UPSTREAM, MODEL, MODEL_CONFIG, TOKENIZER, LORA)
    names = {name for table in (*tables, *map(declared_keys, (Source, Stage))) for name in table}
    assert [name for name in sorted(names) if f"\n| `{name}` | " not in text] == []


def test_every_row_has_all_columns():
    for block in PAGE.read_text().split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count(" | ") for row in rows}) <= 1
