"""Optimizers beside AdamW: a run that is interrupted resumes to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hfsft import base, sft
from hfsft.errors import RecipeError

RECIPE = {
    "name": "r",
    "sample_prompts": [],
    "model": {"depth": 2, "vocab_size": 400, "max_position_embeddings": 64},
    "tokenizer": {"train": True},
    "base": {
        "data": [{"path": "facts", "rows": 200}],
        "held_out": 0,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 256,
        "max_steps": 4,
        "save_steps": 2,
    },
}


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "runs")}))
    return str(path)


def interrupted(stage: Path, copy: Path, step: int) -> Path:
    """A copy of a finished stage's run as it was when only its checkpoint of `step` was there."""
    shutil.copytree(stage.parent, copy)
    folder = copy / stage.name
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    (folder / "model.safetensors").unlink()
    record = json.loads((folder / "stage.json").read_text()) | {"status": "interrupted"}
    (folder / "stage.json").write_text(json.dumps(record))
    return folder


def assert_resumes_to_the_bit(main, name: str, recipe: str, words: tuple[str, ...]) -> dict:
    """Train a stage, then resume it from its second step; returns the optimizer's last state."""
    runs = Path(recipe).parent / "runs"
    main(recipe, *words, "--quiet")
    stage = runs / "r" / name
    folder = interrupted(stage, runs / "copy" / "r", 2)
    main(recipe, *words, "--quiet", "--output_dir", str(runs / "copy"))
    before, after = (load_file(f / "model.safetensors") for f in (stage, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    first = load_file(folder / "checkpoints/checkpoint-2/model.safetensors")
    assert not all(torch.equal(before[key], first[key]) for key in before)
    return torch.load(folder / "checkpoints/checkpoint-4/optimizer.pt", weights_only=True)


def test_muon_resumes_to_the_bit_with_its_momentum(recipe):
    words = ("--optim", "muon", "--muon.momentum_warmup_steps", "8")
    groups = assert_resumes_to_the_bit(base.main, "base", recipe, words)["param_groups"]
    assert groups[-1]["updates"] == 4
    assert groups[-1]["momentum"] == pytest.approx(0.85 + 3 / 8 * 0.1)  # of the fourth update


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("optim", ["muon", "apollo_adamw"])
def test_sharded_weights_are_refused(recipe, monkeypatch, optim, plugin):
    from hfsft.recipe.loading import load_recipe
    from hfsft.train.arguments import arguments

    stage = load_recipe(recipe, "--optim", optim, stage="base").base
    monkeypatch.setattr("hfsft.model.optimizer.missing_package", lambda optim: None)
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(RecipeError, match=f"{optim} needs whole matrices .*{plugin} shards them"):
        arguments(stage, [], 4)


SFT = {
    "model_name_or_path": "base",
    "data": [{"path": "small_talk", "rows": 100}],
    "held_out": 0,
    "examples_per_step": 4,
    "max_length": 64,
    "max_steps": 4,
    "save_steps": 2,
}


@pytest.fixture
def tuned(recipe) -> str:
    """The recipe with an sft stage, and a base model to start it from."""
    base.main(recipe, "--max_steps", "1", "--quiet")
    path = Path(recipe)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"sft": SFT}))
    return recipe


@pytest.mark.parametrize(
    ("optim", "package"),
    [
        ("apollo_adamw", "apollo_torch"),
        ("adamw_bnb_8bit", "bitsandbytes"),
        # compile their update for each shape: a minute on a CPU
        pytest.param("adamw_torch_8bit", "torchao", marks=pytest.mark.slow),
        pytest.param("adamw_torch_4bit", "torchao", marks=pytest.mark.slow),
    ],
)
def test_weights_in_bfloat16_resume_to_the_bit(tuned, optim, package):
    pytest.importorskip(package)
    words = ("--optim", optim, "--dtype", "bfloat16", "--learning_rate", "1e-3")
    words += ("--model_name_or_path", str(Path(tuned).parent / "runs/r/base"))
    assert_resumes_to_the_bit(sft.main, "sft", tuned, words)
    weights = load_file(Path(tuned).parent / "runs/r/sft/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_activations_are_not_offloaded_from_a_cpu(tuned):
    words = ("--model_name_or_path", str(Path(tuned).parent / "runs/r/base"))
    words += ("--activation_checkpointing_kwargs", "{offload: true}", "--quiet")
    with pytest.raises(RecipeError, match=r"sft\.activation_checkpointing_kwargs\.offload: moves"):
        sft.main(tuned, *words)
    sft.main(tuned, *words, "--gradient_checkpointing", "false", "--max_steps", "1")
