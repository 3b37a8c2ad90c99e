"""A finished training leaves its model, whatever optional part fails around it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfsft import base, sft
from hfsft.train.callbacks import GuardedTracker, guard_trackers
from hfsft.train.trainer import SFTStageTrainer

RECIPE = {
    "model": {"depth": 2, "vocab_size": 400, "max_position_embeddings": 96},
    "tokenizer": {"train": True},
    "base": {
        "data": [{"path": "facts", "rows": 100}],
        "held_out": 0,
        "max_length": 64,
        "tokens_per_step": 128,
        "max_steps": 1,
    },
    "sft": {
        "model_name_or_path": "base",
        "data": [{"path": "simple_spelling", "rows": 40}],
        "held_out": 0,
        "examples_per_step": 4,
        "max_length": 64,
        "max_steps": 2,
        "logging_steps": 1,
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The recipe's file, its base and sft trained."""
    path = tmp_path_factory.mktemp("finishing") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(path.parent)}))
    for stage in (base, sft):
        stage.main(str(path), "--quiet")
    return str(path)


def fails(*args, **kwargs):
    raise RuntimeError("it broke")


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class Tracker(TrainerCallback):
    """A tracker whose server fails at one event."""

    def __init__(self, event: str):
        setattr(self, event, fails)


@pytest.mark.parametrize(
    "where", ["resuming.joules", "resuming.peak_memory", "finishing.model_card"]
)
def test_the_model_is_saved_though_an_optional_part_fails(
    recipe, tmp_path, monkeypatch, capsys, where
):
    monkeypatch.setattr(f"hfsft.train.{where}", fails)
    part = where.partition(".")[2]
    sft.main(recipe, "--output_dir", str(tmp_path))
    folder = tmp_path / "tiny" / "sft"
    assert_same_weights(folder, Path(recipe).parent / "tiny" / "sft")
    record = json.loads((folder / "stage.json").read_text())
    assert record["status"] == "finished" and record["energy_joules"] is None
    assert (record["peak_memory_bytes"] is None) == (part == "peak_memory")
    assert (folder / "README.md").exists() == (part != "model_card")
    said = capsys.readouterr().out
    assert "failed: it broke" in said and said.count("it broke") == (2 if part == "joules" else 1)


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_save", "on_train_end"])
def test_the_model_is_saved_though_a_tracker_fails(recipe, tmp_path, monkeypatch, capsys, event):
    monkeypatch.setattr(Tracker, "__module__", "transformers.integrations.some_tracker")
    init = SFTStageTrainer._add_own_callbacks

    def with_tracker(self):
        self.add_callback(Tracker(event))
        init(self)

    monkeypatch.setattr(SFTStageTrainer, "_add_own_callbacks", with_tracker)
    sft.main(recipe, "--output_dir", str(tmp_path))
    folder = tmp_path / "tiny" / "sft"
    assert_same_weights(folder, Path(recipe).parent / "tiny" / "sft")
    assert capsys.readouterr().out.count("Tracker failed and logs no more: it broke") == 1


def test_only_trackers_are_guarded_and_each_event_reaches_them(monkeypatch):
    class Handler:
        callbacks = (TrainerCallback(), Tracker("on_epoch_end"))

    monkeypatch.setattr(Tracker, "__module__", "transformers.integrations.some_tracker")
    own, seen = Handler.callbacks[0], []
    guard_trackers(Handler, seen.append)
    assert Handler.callbacks[0] is own and isinstance(Handler.callbacks[1], GuardedTracker)
    for name in vars(TrainerCallback):
        if name.startswith("on_"):
            getattr(Handler.callbacks[1], name)(None, None, None)
    assert seen == ["Tracker failed and logs no more: it broke"]
