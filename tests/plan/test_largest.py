"""The largest model that fits: what is just above it does not."""

import json
from pathlib import Path

import pytest

from hfsft.errors import RecipeError
from hfsft.plan import largest
from hfsft.plan.choosing import with_settings
from hfsft.plan.plan import plan_stage
from hfsft.plan.printing import print_largest
from hfsft.recipe.loading import load_recipe

SFT = {"model_name_or_path": "elsewhere", "data": ["identity"], "held_out": 0, "max_length": 128}


def test_the_next_width_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(json.dumps({"name": "r", "sft": SFT}))
    recipe = load_recipe("r.yaml", stage="sft")
    monkeypatch.setattr(largest, "METHODS", largest.METHODS[1:2])
    monkeypatch.setattr(largest, "WIDTHS", range(128, 1025, 128))
    (found,) = largest.largest_models(recipe, 1_200_000_000)
    assert found["method"] == "full"
    assert found["settings"] == "--dtype bfloat16 --optim adamw_torch_8bit"
    for width, fits in ((found["width"], True), (found["width"] + 128, False)):
        largest._config(width, 128).save_pretrained("model")
        settings = {"model_name_or_path": "model", "dtype": "bfloat16", "optim": "adamw_torch_8bit"}
        stage = with_settings(recipe.sft, per_device_train_batch_size=1, **settings)
        plan = plan_stage(recipe, stage, 1_200_000_000, "cuda")
        assert plan.fits is fits
        if fits:
            assert (plan.parameters, plan.peak) == (found["parameters"], found["peak"])
    print_largest([found, found | {"parameters": None}])
    said = capsys.readouterr().out
    assert f"{found['layers']} x {found['width']}" in said and "none fits" in said


def test_a_recipe_that_loads_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"data": ["facts"], "max_steps": 1}
    tokenizer, model = {"path": "gpt2"}, {"depth": 2, "vocab_size": 300}
    text = json.dumps({"model": model, "tokenizer": tokenizer, "base": base})
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="--largest plans sft or mid, and it has neither"):
        largest.largest_models(load_recipe("r.yaml"), 8 * 10**9)
