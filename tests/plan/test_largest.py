"""The largest model that fits: what is just above it does not."""

import json
from pathlib import Path

import pytest

from hfsft.cli import app
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


def test_each_method_has_its_weights_whatever_the_recipe_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"lora": {"r": 8}, "load_in_4bit": True}  # as recipes/qlora-1b.yaml
    Path("r.yaml").write_text(json.dumps({"name": "r", "sft": SFT | settings}))
    planned = []

    def plan(recipe, stage, memory, device):
        planned.append(stage)
        return plan_stage(recipe, stage, memory, device)

    monkeypatch.setattr(largest, "plan_stage", plan)
    monkeypatch.setattr(largest, "METHODS", largest.METHODS[-2:])
    monkeypatch.setattr(largest, "WIDTHS", range(256, 257))
    found = largest.largest_models(load_recipe("r.yaml", stage="sft"), 10**12)
    assert [item["method"] for item in found] == ["LoRA", "QLoRA"]
    assert [stage.load_in_4bit for stage in planned] == [False, True]


def test_a_recipe_that_loads_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"data": ["facts"], "max_steps": 1}
    tokenizer, model = {"path": "gpt2"}, {"depth": 2, "vocab_size": 300}
    text = json.dumps({"model": model, "tokenizer": tokenizer, "base": base})
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="--largest plans sft or mid, and it has neither"):
        largest.largest_models(load_recipe("r.yaml"), 8 * 10**9)


def test_few_plans_are_made_whatever_auto_values_the_recipe_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    auto = {"per_device_train_batch_size": "auto", "optim": "auto", "memory_limit": "1GB"}
    Path("r.yaml").write_text(json.dumps({"name": "r", "output_dir": "runs", "sft": SFT | auto}))
    planned = []
    monkeypatch.setattr(
        largest, "plan_stage", lambda *args: planned.append(args) or plan_stage(*args)
    )
    monkeypatch.setattr(largest, "WIDTHS", range(128, 2049, 128))
    app(["plan", "r.yaml", "--memory", "1.2GB", "--largest", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [item["method"] for item in found] == ["full"] * 4 + ["LoRA", "QLoRA"]
    reached = [item["parameters"] for item in found]
    assert reached[0] < reached[1] <= reached[2] <= reached[4] <= reached[5]
    assert all(0 < item["peak"] <= 1_200_000_000 for item in found)
    assert len(planned) <= 4 * len(found)  # by bisection from the middle it would be more


@pytest.mark.slow  # a minute a recipe
@pytest.mark.parametrize("name", ["fast", "full-1b", "nanochat-d8"])
def test_the_shipped_recipes_reach_more_with_each_method(name, capsys):
    recipe = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    app(["plan", str(recipe), "--memory", "8GB", "--largest"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.count(" B ") == 6 and "none fits" not in said
