"""Steps and tokens a step from the size of the model, beside nanochat's own numbers."""

from pathlib import Path

import pytest
from recipe_texts import load

from hfsft.errors import RecipeError
from hfsft.plan.horizon import best_tokens_per_step, with_horizon

BASE = (
    "model: {depth: 8, vocab_size: %d, max_position_embeddings: 2048}\n"
    "tokenizer: {path: gpt2}\n"
    "base:\n  data: [facts]\n  %s\n  tokens_per_step: %s\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def horizon(vocabulary: int, length: str, tokens: str) -> tuple[int | None, int]:
    recipe = load(BASE % (vocabulary, length, tokens), stage="base")
    stage = with_horizon(recipe, recipe.base)
    return stage.max_steps, stage.tokens_per_step


def test_the_reference_run_has_20_tokens_for_each_parameter():
    assert horizon(65536, "tokens_per_parameter: 20", "524288") == (3520, 524288)


def test_nanochats_horizon_and_step():
    # depth 8, 2^15 tokens: 25,165,824 in the blocks and 16,777,216 in the head, times 12
    assert horizon(32768, "tokens_per_scaling_parameter: 12", "auto") == (1920, 262144)
    assert 1920 == 12 * (25_165_824 + 16_777_216) // 262144


def test_steps_that_are_given_stay():
    assert horizon(32768, "max_steps: 7", "auto") == (7, 262144)
    assert horizon(32768, "max_steps: 7", "4096") == (7, 4096)


@pytest.mark.parametrize(("depth", "tokens"), [(4, 2**18), (12, 2**19), (20, 2**20), (26, 2**20)])
def test_tokens_of_a_step_by_depth(depth, tokens):
    # as karpathy/nanochat's base_train.py computes them for its vocabulary of 2^15
    width = 64 * depth
    assert best_tokens_per_step(12 * depth * width**2 + 2**15 * width, 2**15) == tokens


def test_less_than_one_step_is_refused():
    with pytest.raises(RecipeError, match="are less than one step of 1,073,741,824"):
        horizon(300, "tokens_per_parameter: 1", str(2**30))


def test_a_recipe_is_resolved_when_it_starts(capsys):
    from hfsft.train.stage import with_known_steps

    recipe = load(BASE % (300, "tokens_per_parameter: 20", "auto"), stage="base")
    stage = with_known_steps(recipe, recipe.base)
    said = capsys.readouterr().out
    assert said == f"base: {stage.max_steps:,} steps of {stage.tokens_per_step:,} tokens\n"
    assert Path("r.yaml").is_file()
