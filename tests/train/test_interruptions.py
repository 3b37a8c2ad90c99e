"""Runs that are killed, signalled, out of disk or fed bad numbers, and what they end with."""

import contextlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from faults import CONFIGS, RECIPE, STEPS, bits, harness
from filelock import FileLock
from transformers import TrainerCallback

from hfsft import base, mid, sft
from hfsft.errors import CheckpointError, Interrupted, RecipeError, TrainingError
from hfsft.process import Stopped
from hfsft.run.manifest import checkpoints
from hfsft.train.trainer import SFTStageTrainer


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    said = harness(tmp_path, "--rounds", "2", "--configs", "sft")
    assert re.fullmatch(
        r"sft: 2 rounds, \d+ kills, \d+ during a save, 0 other statuses, 0 mismatches\n", said
    )


# a release is tried with `python tests/faults.py FOLDER --rounds 50`: 50 of each take hours
ROUNDS = dict.fromkeys(CONFIGS, "4") | {"run": "1"}  # a round of which takes 40 s


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_rounds_of_kills(tmp_path, config):
    said = harness(tmp_path, "--rounds", ROUNDS[config], "--configs", config)
    assert f"{ROUNDS[config]} rounds" in said and "0 other statuses, 0 mismatches" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
@pytest.mark.parametrize("config", ["sft", "stream", "ranks", "run"])
def test_rounds_of_signals(tmp_path, config, name):
    said = harness(tmp_path, "--rounds", ROUNDS[config], "--configs", config, "--signal", name)
    assert f"{ROUNDS[config]} rounds" in said and "0 other statuses, 0 mismatches" in said


# --- in this process ---


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The harness's recipe, with base and mid trained and a whole sft run to compare with."""
    folder = tmp_path_factory.mktemp("faults")
    path = folder / "faults.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder / "runs")}))
    for stage in (base, mid, sft):
        stage.main(str(path), "--quiet")
    return str(path)


@pytest.fixture
def whole(recipe) -> dict[str, str]:
    """What the run that was left alone has."""
    return bits(Path(recipe).parent / "runs" / "start" / "sft")


@pytest.fixture
def place(tmp_path) -> tuple[str, ...]:
    """A run of its own that starts from the recipe's mid stage."""
    return ("--output_dir", str(tmp_path), "--quiet")


def sft_folder(tmp_path) -> Path:
    return tmp_path / "start" / "sft"


@contextlib.contextmanager
def acting(monkeypatch, **methods):
    """Every `SFTStageTrainer` within has a callback with these methods."""
    callback = type("Act", (TrainerCallback,), methods)
    init = SFTStageTrainer.__init__

    def with_callback(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(callback())
        callback.trainer = self

    with monkeypatch.context() as patched:
        patched.setattr(SFTStageTrainer, "__init__", with_callback)
        yield


def sends(number: int, at: int):
    """A callback's method that sends this process a signal at a step."""

    def send(self, args, state, control, **kwargs):
        if state.global_step == at:
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(
    ("event", "step", "reached", "number"),
    [
        ("on_step_begin", 3, 4, signal.SIGTERM),
        ("on_step_end", 4, 5, signal.SIGINT),
        ("on_save", 2, 3, signal.SIGHUP),
        ("on_prediction_step", 3, 3, signal.SIGTERM),
        ("on_prediction_step", 0, 0, signal.SIGTERM),
    ],
)
def test_a_signal_whenever_it_comes(
    recipe, whole, place, tmp_path, monkeypatch, event, step, reached, number
):
    with (
        acting(monkeypatch, **{event: sends(number, step)}),
        pytest.raises(
            Interrupted, match=rf"by {signal.Signals(number).name} at step {reached}\b"
        ) as caught,
    ):
        sft.main(recipe, *place)
    assert caught.value.exit_status == 128 + number
    folder = sft_folder(tmp_path)
    assert json.loads((folder / "stage.json").read_text())["status"] == "interrupted"
    assert not (folder / "model.safetensors").exists()
    assert max([0, *(int(c.name[11:]) for c in checkpoints(folder / "checkpoints"))]) == reached
    sft.main(recipe, *place)
    assert bits(folder) == whole


def test_a_second_signal_it_abandons_the_step(recipe, whole, place, tmp_path, monkeypatch):
    parts = []

    def count(self, args, state, control, **kwargs):
        model = type(self).trainer.model
        inner = model.model.forward

        def forward(*args, **kwargs):
            parts.append(type(self).trainer.state.global_step)
            if parts.count(3) == 2 and model.training:  # in the second micro-batch of step 4
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.setattr(type(type(self).trainer.stop_signal), "TOGETHER", 0.0)
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*args, **kwargs)

        model.model.forward = forward

    with (
        acting(monkeypatch, on_train_begin=count),
        pytest.raises(Interrupted, match=r"at step 3 of 6, saved in .*checkpoint-3"),
    ):
        sft.main(recipe, *place, "--per_device_train_batch_size", "1")
    sft.main(recipe, *place, "--per_device_train_batch_size", "1")
    left_alone = tmp_path / "alone"
    sft.main(
        recipe, "--output_dir", str(left_alone), "--quiet", "--per_device_train_batch_size", "1"
    )
    assert bits(sft_folder(tmp_path)) == bits(left_alone / "start" / "sft")


def test_a_damaged_checkpoint_is_skipped_and_reported(recipe, whole, tmp_path, monkeypatch, capsys):
    place = ("--output_dir", str(tmp_path))
    with acting(monkeypatch, on_step_begin=sends(signal.SIGTERM, 3)), pytest.raises(Interrupted):
        sft.main(recipe, *place)
    newest = sft_folder(tmp_path) / "checkpoints" / "checkpoint-4"
    held = bytearray((newest / "optimizer.pt").read_bytes())
    held[1000] ^= 4
    (newest / "optimizer.pt").write_bytes(held)
    capsys.readouterr()
    sft.main(recipe, *place)
    said = capsys.readouterr().out
    assert (
        "skipping an invalid checkpoint: " in said
        and "checkpoint-4: optimizer.pt is not what was written" in said
    )
    assert "resuming from" in said and "checkpoint-3" in said
    assert bits(sft_folder(tmp_path)) == whole
    assert (newest.parent / "checkpoint-4.broken-1" / "optimizer.pt").read_bytes() == held


def cut(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log.unlink(),
        cut,
        lambda log: log.write_bytes(b"\xff\xfe\x00" + log.read_bytes()[40:]),
        lambda log: log.write_text('{"a": 1}\n{"step": "x"}\n[]\n' * 3),
    ],
    ids=["deleted", "cut", "not UTF-8", "another's"],
)
def test_a_lost_log_is_restored_from_the_checkpoint(
    recipe, whole, tmp_path, monkeypatch, capsys, damage
):
    place = ("--output_dir", str(tmp_path))
    with acting(monkeypatch, on_step_begin=sends(signal.SIGTERM, 3)), pytest.raises(Interrupted):
        sft.main(recipe, *place)
    names = ("metrics.jsonl", "validation.jsonl")
    before = [(sft_folder(tmp_path) / name).read_bytes() for name in names]
    for name in names:
        damage(sft_folder(tmp_path) / name)
    capsys.readouterr()
    sft.main(recipe, *place)
    assert capsys.readouterr().out.count("lacked lines; they are restored from") == 2
    assert bits(sft_folder(tmp_path)) == whole
    for name, held in zip(names, before, strict=True):
        assert (sft_folder(tmp_path) / name).read_bytes().startswith(held)


def test_no_valid_checkpoint_is_no_fresh_start(recipe, place, tmp_path, monkeypatch):
    with acting(monkeypatch, on_step_begin=sends(signal.SIGTERM, 1)), pytest.raises(Interrupted):
        sft.main(recipe, *place)
    for checkpoint in checkpoints(sft_folder(tmp_path) / "checkpoints"):
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match=r"--restart\n  .*checkpoint-2: scheduler.pt is miss"):
        sft.main(recipe, *place)
    sft.main(recipe, *place, "--restart")
    assert (tmp_path / "start" / "sft.old-1").is_dir()


def test_a_second_run_on_the_same_folder_is_refused(recipe, place, tmp_path):
    folder = sft_folder(tmp_path) / "checkpoints"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(RecipeError, match="another run is training"):
        sft.main(recipe, *place)
    sft.main(recipe, *place)


def test_what_leaves_the_result_alone_may_change_between(
    recipe, place, tmp_path, monkeypatch, whole
):
    with acting(monkeypatch, on_step_begin=sends(signal.SIGTERM, 1)), pytest.raises(Interrupted):
        sft.main(recipe, *place)
    sft.main(recipe, *place, "--save_total_limit", "5", "--max_bad_steps", "7")
    assert bits(sft_folder(tmp_path)) == whole


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", "1e-4"), ("max_length", "32"), ("seed", "7"), ("held_out", "5")],
)
def test_what_changes_the_result_is_refused(recipe, place, monkeypatch, key, value):
    with acting(monkeypatch, on_step_begin=sends(signal.SIGTERM, 1)), pytest.raises(Interrupted):
        sft.main(recipe, *place)
    flag = f"--{key}" if key != "seed" else "--seed"
    with pytest.raises(RecipeError, match=rf"stopped at checkpoint-2 .*{key}"):
        sft.main(recipe, *place, flag, value)


def test_an_edited_file_is_noticed(recipe, place, tmp_path, monkeypatch):
    rows = [{"prompt": f"What is {n}?", "completion": f"A number, {n}."} for n in range(60)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = (*place, "--data", f"[{{path: {path}}}]")
    with acting(monkeypatch, on_step_begin=sends(signal.SIGTERM, 1)), pytest.raises(Interrupted):
        sft.main(recipe, *place)
    rows[7]["completion"] = "A number, 8."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match=r"the data has changed since .*checkpoint-2"):
        sft.main(recipe, *place)
    rows[7]["completion"] = "A number, 7."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.main(recipe, *place)


@pytest.mark.parametrize(("where", "is_saved"), [("write_rope_theta", False), ("model_card", True)])
def test_an_interrupted_final_save_is_redone(
    recipe, whole, place, tmp_path, monkeypatch, where, is_saved
):
    def stop(*args):
        raise Stopped(signal.SIGTERM)

    folder = sft_folder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(f"hfsft.train.finishing.{where}", stop)
        with pytest.raises(Stopped):
            sft.main(recipe, *place)
    # the model comes first, the card after it
    assert bool(list(folder.glob("*.safetensors"))) == (folder / "config.json").exists() == is_saved
    assert json.loads((folder / "stage.json").read_text())["status"] == "running"
    sft.main(recipe, *place)
    assert bits(folder) == whole
    assert not (folder / "checkpoints" / "partial").exists()


# --- outside the training loop ---

# a command that is in Python, or in a long call into C, in which Python runs no handler
BUSY = {
    "python": "time.sleep(300)",
    "c": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", BUSY)
def test_a_command_answers_signals_in_one_line(where, number):
    code = (
        "import hashlib, time\nfrom hfsft.process import run_main\n"
        f"def main():\n    print('busy', flush=True)\n    {BUSY[where]}\nrun_main(main)"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell in the background, or nohup, ignores
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert command.stdout.readline() == "busy\n"
    command.send_signal(number)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 128 + number
    assert re.fullmatch(r"hfsft: (interrupted|stopped by SIG\w+)\n", said)


LOADING = """
import sys, time
from hfsft.process import run_main
sys.path.insert(0, sys.argv[1])
def main():
    import slow_library
run_main(main)
"""
SLOW = """
import time
print("busy", flush=True)
try:
    time.sleep(300)
except BaseException as error:
    raise ImportError("half loaded") from error
"""
UNWINDING = """
import time
from hfsft.process import run_main
def main():
    try:
        print("busy", flush=True)
        time.sleep(300)
    finally:
        print("unwinding", flush=True)
        time.sleep(1)
run_main(main)
"""


def started(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libraries_load_is_one_line(tmp_path, number):
    (tmp_path / "slow_library.py").write_text(SLOW)
    command = started(LOADING, str(tmp_path))
    assert command.stdout.readline() == "busy\n"
    command.send_signal(number)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 128 + number
    assert re.fullmatch(r"hfsft: (interrupted|stopped by SIGTERM)\n", said)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_first_unwinds_changes_nothing(second):
    command = started(UNWINDING)
    assert command.stdout.readline() == "busy\n"
    command.send_signal(signal.SIGINT)
    assert command.stdout.readline() == "unwinding\n"
    for _ in range(3):
        command.send_signal(second)
    assert command.communicate(timeout=60)[1] == "hfsft: interrupted\n"
    assert command.returncode == 130


def test_nohup_is_heeded(recipe, whole, place, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with acting(monkeypatch, on_step_begin=sends(signal.SIGHUP, 3)):
            sft.main(recipe, *place)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert bits(sft_folder(tmp_path)) == whole


# --- the disk ---


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Writing beyond so many bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_says_what_a_checkpoint_takes(recipe, place, tmp_path):
    with (
        files_of_at_most(100_000),
        pytest.raises(
            CheckpointError, match=r"cannot save .*checkpoint-1: .*\n.*about \d+ MB; the"
        ),
    ):
        sft.main(recipe, *place)
    folder = sft_folder(tmp_path) / "checkpoints"
    assert checkpoints(folder) == [] and not (folder / "partial").exists()
    sft.main(recipe, *place)


def test_a_full_disk_after_a_good_checkpoint_may_continue(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, args, state, control, **kwargs):
        if state.global_step in (2, 4):
            size = 100_000 if state.global_step == 2 else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    place = ("--output_dir", str(tmp_path), "--on_save_error", "continue")
    try:
        with acting(monkeypatch, on_step_begin=fill):
            sft.main(recipe, *place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().out
    assert len(re.findall(r"cannot save .*checkpoint-(\d)", said)) == 2
    assert said.count("the last good checkpoint is") == said.count("; training continues") == 2
    assert bits(sft_folder(tmp_path)) == whole


# --- numbers that are none ---


def poison(steps: set[int]):
    """A callback's method that makes the loss of these steps NaN."""

    def begin(self, args, state, control, **kwargs):
        trainer = type(self).trainer
        inner = trainer.model.model.forward

        def forward(*args, **kwargs):
            output = inner(*args, **kwargs)
            if trainer.model.training and trainer.state.global_step + 1 in steps:
                output.last_hidden_state = output.last_hidden_state * math.nan
            return output

        trainer.model.model.forward = forward

    return begin


def test_a_nan_is_never_stepped_on(recipe, place, tmp_path, monkeypatch):
    seen = {}

    def remember(self, args, state, control, model=None, **kwargs):
        seen[state.global_step] = [p.detach().clone() for p in model.parameters()]

    with acting(monkeypatch, on_train_begin=poison({2, 5}), on_step_end=remember):
        sft.main(recipe, *place, "--logging_steps", "1")
    changed = {
        step: any(not torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        for step in range(2, STEPS + 1)
    }
    assert changed == {2: False, 3: True, 4: True, 5: False, 6: True}
    folder = sft_folder(tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {step for step, loss in losses.items() if math.isnan(loss)} == {2, 5}
    noted = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in noted] == [2, 5]
    assert len(noted[0]["examples"]) == 8
    for example in noted[0]["examples"]:
        assert example["source"] == "simple_spelling" and 0 <= example["row"] < 60


def test_three_nans_in_a_row_stop_the_stage(recipe, place, tmp_path, monkeypatch):
    with (
        acting(monkeypatch, on_train_begin=poison({3, 4, 5})),
        pytest.raises(TrainingError, match=r"3 steps in a row, up to step 5; .*checkpoint-4\n"),
    ):
        sft.main(recipe, *place)
    # those left out changed nothing: what was saved after them is as good as before
    assert json.loads((sft_folder(tmp_path) / "stage.json").read_text())["status"] == "failed"


def test_a_weight_that_is_no_number_is_never_saved(recipe, place, tmp_path, monkeypatch):
    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).data[0, 0] = math.inf

    with (
        acting(monkeypatch, on_step_end=spoil),
        pytest.raises(CheckpointError, match=r"not a finite number at step 3.*checkpoint-2"),
    ):
        sft.main(recipe, *place)
    newest = checkpoints(sft_folder(tmp_path) / "checkpoints")[0]
    assert newest.name == "checkpoint-2"
