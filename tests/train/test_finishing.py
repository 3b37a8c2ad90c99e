"""A finished training leaves its model, whatever optional part fails around it."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hfsft import base, sft
from hfsft.errors import CheckpointError, ModelError
from hfsft.evaluation.answering import Evaluator, load_for_answers
from hfsft.hub.push import push_run
from hfsft.run.manifest import MANIFEST, verify_model
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.train import finishing
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


def test_ranks_meet_after_the_push(recipe, tmp_path, monkeypatch):
    """Else other machines would join the store of a stage that is still pushed."""
    done = []
    monkeypatch.setattr(finishing, "_push", lambda *given: done.append("pushed"))
    monkeypatch.setattr(finishing, "meet", lambda doing, quiet: done.append(doing))
    sft.main(recipe, "--output_dir", str(tmp_path), "--quiet")
    assert done == ["pushed", "pushes"]


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


# --- a finished stage that is damaged ---


@pytest.fixture
def finished(recipe):
    """The folder of the finished sft stage, put back as it was at the end of the test."""
    folder = Path(recipe).parent / "tiny" / "sft"
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished stage but its checkpoints."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "checkpoints" not in path.parts
    }


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_bit_is_noticed_wherever_the_model_is_used(recipe, finished, name):
    held = bytearray((finished / name).read_bytes())
    held[len(held) // 2] ^= 1
    (finished / name).write_bytes(held)
    uses = {
        "the command again": lambda: sft.main(recipe, "--quiet"),
        "a stage that starts from it": lambda: load_tokenizer(str(finished)),
        "chat": lambda: load_for_answers(str(finished)),
        "eval": lambda: Evaluator(str(finished)),
        "push": lambda: push_run(str(finished), "me/x"),
    }
    for use in uses.values():
        with pytest.raises(CheckpointError, match=f"sft: {name} is not what was written") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 2
    assert (finished / name).read_bytes() == held
    (finished / MANIFEST).unlink()  # as the message says
    verify_model(finished)


@pytest.mark.parametrize(
    "gone", [["model.safetensors"], ["stage.json"], ["config.json", "stage.json"]]
)
def test_what_is_missing_is_written_again_from_the_checkpoint(recipe, finished, gone):
    before = contents(finished)
    for name in gone:
        (finished / name).unlink()
    sft.main(recipe, "--quiet")
    after = contents(finished)
    clocked = ("stage.json", "metrics.jsonl", "README.md", MANIFEST)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name] and name not in clocked] == []
    # the stages that start from it see the same model
    then, now = (json.loads(held["stage.json"]) for held in (before, after))
    assert then["started"] == now["started"] and now["status"] == "finished"


def test_what_is_missing_without_a_checkpoint_is_an_error(recipe, finished):
    shutil.rmtree(finished / "checkpoints")
    (finished / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"safetensors is missing, and there is no .*\n.*--rest"
    ):
        sft.main(recipe, "--quiet")


UNREADABLE = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("plant", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_plain_file_is_not_waited_for(recipe, finished, capsys, plant):
    (finished / "stage.json").unlink()
    plant(finished / "stage.json")
    sft.main(recipe)
    assert "stage.json could not be read; it was written again" in capsys.readouterr().out
    (finished / MANIFEST).unlink()
    plant(finished / MANIFEST)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        sft.main(recipe)


@pytest.mark.parametrize("text", ['{"files": {}}', "[" * 100_000])
def test_a_manifest_of_nothing_vouches_for_nothing(recipe, finished, text):
    (finished / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"its manifest.json cannot be read"):
        sft.main(recipe)


FOREIGN = {
    "empty": b"",
    "cut": b'{"stage": "sft", "sta',
    "a list": b"[]",
    "another tool's": b'{"stage": {"name": "x"}}',
    "not UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("with_manifest", [True, False], ids=["finished", "checkpoint"])
def test_a_record_that_cannot_be_read_is_written_again(
    recipe, finished, capsys, content, with_manifest
):
    before = json.loads((finished / "stage.json").read_text())
    (finished / "stage.json").write_bytes(content)
    if not with_manifest:  # then the checkpoint has a copy
        (finished / MANIFEST).unlink()
    sft.main(recipe)
    said = capsys.readouterr().out
    assert "stage.json could not be read; it was written again from its copy" in said
    assert ("finished already" in said) == with_manifest
    after = json.loads((finished / "stage.json").read_text())
    assert after["settings"] == before["settings"] and after["started"] == before["started"]
    assert (finished / "stage.json.broken-1").read_bytes() == content


def test_a_record_without_any_copy_is_an_error_that_touches_nothing(recipe, finished):
    shutil.rmtree(finished / "checkpoints")
    (finished / MANIFEST).unlink()
    (finished / "stage.json").write_bytes(b"")
    before = contents(finished)
    with pytest.raises(CheckpointError, match=r"stage.json: cannot be read.*\n.*--restart"):
        sft.main(recipe, "--quiet")
    assert contents(finished) == before


def test_what_is_planted_at_partial_names_is_neither_followed_nor_fatal(recipe, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "kept").write_text("theirs")
    folder = tmp_path / "tiny" / "sft"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "partial").symlink_to(theirs)
    (folder / "checkpoints" / "deleted").write_text("a file")
    (folder / "adapter").symlink_to(theirs)
    (folder / "stage.json").mkdir()
    (folder / "README.md").symlink_to(theirs / "kept")
    folder.with_name("sft.longer").symlink_to(theirs)
    folder.with_name("sft.longer.partial").write_text("a file")
    sft.main(recipe, "--output_dir", str(tmp_path), "--quiet", "--save_total_limit", "1")
    assert {path.name: path.read_text() for path in theirs.iterdir()} == {"kept": "theirs"}
    assert_same_weights(folder, Path(recipe).parent / "tiny" / "sft")
    verify_model(folder)


# --- weights that are not finite ---


@pytest.mark.parametrize("lora", [(), ("--lora.r", "4")], ids=["full", "lora"])
def test_weights_that_are_not_finite_are_never_the_final_model(recipe, tmp_path, monkeypatch, lora):
    init = SFTStageTrainer.__init__

    class Spoil(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            trained = next(p for p in model.parameters() if p.requires_grad)
            trained.data.view(-1)[0] = math.nan

    def with_callback(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Spoil())

    monkeypatch.setattr(SFTStageTrainer, "__init__", with_callback)
    place = ("--output_dir", str(tmp_path), "--save_strategy", "no", "--quiet", *lora)
    with pytest.raises(CheckpointError, match="a weight is not a finite number at step 2"):
        sft.main(recipe, *place)
    assert not list((tmp_path / "tiny" / "sft").glob("*.safetensors"))


@pytest.mark.parametrize("lora", [(), ("--lora.r", "4")], ids=["full", "lora"])
def test_weights_that_are_not_finite_are_noticed_at_the_start(recipe, tmp_path, lora):
    start = tmp_path / "start"
    shutil.copytree(Path(recipe).parent / "tiny" / "base", start)
    (start / MANIFEST).unlink()
    weights = load_file(start / "model.safetensors")
    weights["lm_head.weight"][0, 0] = math.inf
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    place = ("--output_dir", str(tmp_path), "--model_name_or_path", str(start), "--quiet", *lora)
    with pytest.raises(ModelError, match=r"start has a weight that is not a finite number\n"):
        sft.main(recipe, *place)
    assert not (tmp_path / "tiny" / "sft" / "metrics.jsonl").exists()
