"""Checkpoints: valid or skipped, whether a file is missing, truncated or has a flipped bit."""

import json
import shutil

import pytest

from hfsft.errors import CheckpointError
from hfsft.run import manifest
from hfsft.run.manifest import (
    DELETED,
    MANIFEST,
    PARTIAL,
    checkpoints,
    clear,
    commit,
    newest_valid,
    rotate,
    seal,
    verify,
    verify_model,
)


def write(folder, step, **facts):
    """A checkpoint of three files, one of them in a subfolder."""
    partial = folder / PARTIAL
    (partial / "deep").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (partial / "optimizer.pt").write_bytes(b"o" * 5000)
    (partial / "deep" / "rng_state.pth").write_bytes(bytes([step]))
    commit(partial, folder / f"checkpoint-{step}", {"step": step, **facts})
    return folder / f"checkpoint-{step}"


def test_a_committed_folder_verifies(tmp_path):
    made = write(tmp_path, 3, recipe="abc")
    held = verify(made)
    assert held["step"] == 3 and held["recipe"] == "abc"
    assert {name: facts["bytes"] for name, facts in held["files"].items()} == {
        "model.safetensors": 25600,
        "optimizer.pt": 5000,
        "deep/rng_state.pth": 1,
    }
    assert not (tmp_path / PARTIAL).exists()
    assert newest_valid(tmp_path) == (made, [])


def flip(path, at):
    held = bytearray(path.read_bytes())
    held[at] ^= 1
    path.write_bytes(held)


DAMAGE = {
    "missing": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "empty": (lambda c: (c / "optimizer.pt").write_bytes(b""), "optimizer.pt has 0 of 5,000 bytes"),
    "truncated": (
        lambda c: (c / "model.safetensors").write_bytes(bytes(99)),
        "model.safetensors has 99 of 25,600 bytes",
    ),
    "first bit": (lambda c: flip(c / "model.safetensors", 0), "model.safetensors is not what was"),
    "last bit": (lambda c: flip(c / "optimizer.pt", -1), "optimizer.pt is not what was written"),
    "rng": (lambda c: flip(c / "deep" / "rng_state.pth", 0), "deep/rng_state.pth is not what was"),
    "folder": (lambda c: shutil.rmtree(c / "deep"), "deep/rng_state.pth is missing"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "truncated manifest": (
        lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:-9]),
        f"its {MANIFEST} cannot be read",
    ),
    "other manifest": (lambda c: (c / MANIFEST).write_text("[]"), "cannot be read"),
    "odd manifest": (lambda c: (c / MANIFEST).write_text('{"files": {"a": 1}}'), "cannot be read"),
    "binary manifest": (lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, damage):
    good, broken = write(tmp_path, 9), write(tmp_path, 10)
    DAMAGE[damage][0](broken)
    with pytest.raises(CheckpointError, match=DAMAGE[damage][1]):
        verify(broken)
    found, problems = newest_valid(tmp_path)
    assert found == good
    assert len(problems) == 1 and "checkpoint-10: " in problems[0]
    assert broken.exists()


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"--restart\n.*-2: optim.*\n.*-1: optim"):
        newest_valid(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    for name in (PARTIAL, DELETED, "checkpoint-x", "checkpoint-3.broken-1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints(tmp_path) == []
    assert newest_valid(tmp_path) == (None, [])


def test_steps_are_sorted_as_numbers(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    assert [c.name for c in checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-10",
        "checkpoint-9",
    ]


def test_a_damaged_checkpoint_is_moved_aside_when_its_step_is_saved_again(tmp_path):
    for _ in range(3):
        (write(tmp_path, 5) / "optimizer.pt").unlink()
    valid = write(tmp_path, 5)
    assert newest_valid(tmp_path) == (valid, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-5",
        "checkpoint-5.broken-1",
        "checkpoint-5.broken-2",
        "checkpoint-5.broken-3",
    ]


def test_a_valid_checkpoint_is_not_overwritten(tmp_path):
    made = write(tmp_path, 5)
    before = (made / MANIFEST).stat().st_mtime_ns
    write(tmp_path, 5, other=True)
    assert "other" not in verify(made) and (made / MANIFEST).stat().st_mtime_ns == before
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_rotation_keeps_the_newest_the_best_and_what_others_wrote(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    foreign = tmp_path / "checkpoint-0"
    foreign.mkdir()
    rotate(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 6
    rotate(tmp_path, 2, {1})
    assert [c.name for c in checkpoints(tmp_path)] == [
        "checkpoint-5",
        "checkpoint-4",
        "checkpoint-1",
        "checkpoint-0",
    ]
    assert not (tmp_path / DELETED).exists()


def test_clear_removes_interrupted_saves_and_deletions(tmp_path):
    good = write(tmp_path, 1)
    for name in (PARTIAL, DELETED):
        (tmp_path / name / "deep").mkdir(parents=True)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    clear(tmp_path)


def test_a_manifest_is_plain_json(tmp_path):
    made = write(tmp_path, 1)
    facts = json.loads((made / MANIFEST).read_text())["files"]["deep/rng_state.pth"]
    assert facts == {
        "bytes": 1,
        "sha256": "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a",
    }


def finished(folder):
    """A finished stage's folder."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    seal(folder, {"record": {"stage": "sft"}})
    (folder / "stage.json").write_text("{}")
    (folder / "README.md").write_text("card")
    return folder


def test_a_finished_model_is_checked_again_only_where_it_changed(tmp_path, monkeypatch):
    folder = finished(tmp_path / "sft")
    read = []
    digest = manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path: read.append(path) or digest(path))
    for _ in range(3):
        verify_model(folder)
    assert len(read) == 2
    (folder / "README.md").write_text("a card of the user's own")
    verify_model(folder)
    flip(folder / "model.safetensors", 7)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"sft: model.safetensors is not what .*\n.*delete"
        ):
            verify_model(folder)
    flip(folder / "model.safetensors", 7)
    verify_model(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter/adapter_config.json is missing"):
        verify_model(folder)


def test_folders_without_a_manifest_of_ours_are_not_checked(tmp_path):
    verify_model(tmp_path / "nowhere")
    verify_model(tmp_path)
    (tmp_path / MANIFEST).write_text('{"of": "another tool"}')
    verify_model(tmp_path)
    checkpoint = write(tmp_path / "checkpoints", 3)
    verify_model(checkpoint)
    flip(checkpoint / "optimizer.pt", 0)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is not what was written"):
        verify_model(checkpoint)


def test_a_link_or_file_at_a_name_of_ours_is_removed_but_not_its_target(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "kept").write_text("theirs")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / PARTIAL).symlink_to(theirs)
    (folder / DELETED).write_text("a file")
    clear(folder)
    assert list(folder.iterdir()) == [] and (theirs / "kept").read_text() == "theirs"
    write(folder, 1)
    write(folder, 2)
    (folder / DELETED).symlink_to(theirs)
    rotate(folder, 1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert (theirs / "kept").read_text() == "theirs"
