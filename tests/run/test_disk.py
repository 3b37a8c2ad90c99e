"""Stages on small, full or read-only disks: real ones, mounted for the test."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from faults import EVERY_STEP, STEPS, bits
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfsft import sft
from hfsft.data.mixture import mix_conversations
from hfsft.errors import CheckpointError, DataError, DiskShortage
from hfsft.plan.sizes import SMALL_FILES, checkpoint_size, most_checkpoints
from hfsft.run.disk import folder_size, writing_to
from hfsft.train.trainer import SFTStageTrainer

SIZE = 6_000_000  # bytes of the small disk
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def disk(tmp_path):
    """A separate disk of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "hfsft-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer, make_model) -> Path:
    """A folder with a recipe, the model it starts from, and a finished run in `runs`."""
    folder = tmp_path_factory.mktemp("disk")
    make_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {
        "name": "fast",
        "output_dir": str(folder / "runs"),
        "sft": {
            "model_name_or_path": str(folder / "model"),
            "data": [{"path": "simple_spelling", "rows": 60}],
            "held_out": 6,
            "examples_per_step": 8,
            "max_length": 64,
            "learning_rate": 1e-3,
            **EVERY_STEP,
        },
    }
    (folder / "fast.yaml").write_text(yaml.safe_dump(recipe))
    sft.main(str(folder / "fast.yaml"), "--quiet")
    return folder


def run(start: Path, disk: Path, *arguments: str) -> dict[str, str]:
    """The bits of the stage, trained on the given disk."""
    sft.main(str(start / "fast.yaml"), "--output_dir", str(disk), "--quiet", *arguments)
    return bits(disk / "fast" / "sft")


def fill(disk: Path, pages: int = 0) -> None:
    """Fill a disk, leaving this many pages free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(ballast, ballast.stat().st_size - pages * PAGE)


def empty(disk: Path) -> None:
    (disk / "ballast").unlink()


@contextlib.contextmanager
def at(monkeypatch, event: str, step: int, act):
    """Call `act(trainer)` at an event of the trainer, after a step."""

    def method(self, args, state, control, **kwargs):
        if state.global_step == step:
            act(callback.trainer)

    callback = type("Act", (TrainerCallback,), {event: method})
    init = SFTStageTrainer.__init__

    def with_callback(self, *args, **kwargs):
        init(self, *args, **kwargs)
        callback.trainer = self
        self.callback_handler.callbacks.insert(0, callback())
        if event == "init":
            act(self)

    with monkeypatch.context() as patched:
        patched.setattr(SFTStageTrainer, "__init__", with_callback)
        yield


def pad_log(disk: Path) -> None:
    """Pad the log so that its next line needs a new page."""
    log = disk / "fast" / "sft" / "metrics.jsonl"
    with log.open("a") as file:
        file.write("\n" * (-log.stat().st_size % PAGE))


def test_a_disk_that_keeps_running_full(start, disk, monkeypatch):
    stage = disk / "fast" / "sft"
    fill(disk)
    with pytest.raises(DiskShortage, match=r"fast/sft: cannot be written: .*No space left"):
        run(start, disk)  # data.json
    empty(disk)
    for event, step, pages, where in (
        ("init", 0, 0, "fast"),  # recipe.yaml
        ("init", 0, 1, "fast/sft"),  # stage.json
        ("on_step_end", 2, 20, "checkpoint-2"),
        ("on_step_begin", 3, 0, "fast/sft"),  # metrics.jsonl
        ("on_train_end", STEPS, 20, "fast/sft"),  # the finished model
    ):

        def act(trainer, event=event, pages=pages):
            if event == "on_step_begin":
                pad_log(disk)
            fill(disk, pages)

        with (
            at(monkeypatch, event, step, act),
            pytest.raises((DiskShortage, CheckpointError), match=where) as caught,
        ):
            run(start, disk, "--ignore_plan")
        assert caught.value.exit_status == 2
        first, second = str(caught.value).splitlines()
        assert "cannot" in first and " bytes are free" in second
        empty(disk)
    # as after a kill: the disk was full for the record as well
    assert json.loads((stage / "stage.json").read_text())["status"] in ("running", "failed")
    assert run(start, disk) == bits(start / "runs" / "fast" / "sft")


def test_the_cache_on_a_full_disk(disk, tmp_path, tokenizer, make_stage, monkeypatch):
    data = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"A number, {n}."} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = make_stage(str(data), examples_per_step=8, max_steps=4, trainer={})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk)
    messages, mixture = [], None
    while mixture is None:  # the cache of the rows, of what was checked, of the tokens
        fill(disk, len(messages))
        try:
            mixture = mix_conversations(stage, tokenizer)
        except DiskShortage as error:
            messages.append(str(error))
        finally:
            empty(disk)
    assert len(messages) > 2 and mixture.train.num_rows == 32
    for message in messages:
        first, second = message.splitlines()
        assert "cannot be written: " in first
        assert " bytes are free on the disk of " in second and str(disk) in second


def test_too_little_room_is_reported_before_the_first_step(start, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(DiskShortage, match=r"fast/sft cannot be written to: .* is read-only"):
        run(start, disk)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "fast").symlink_to("nowhere")
    with pytest.raises(DiskShortage, match=r"fast is a dangling symlink"):
        run(start, disk)
    (disk / "fast").unlink()
    fill(disk, pages=100)
    with pytest.raises(DiskShortage, match=r"sft: .*fast/sft needs [\d,]+ bytes .* more") as caught:
        run(start, disk)
    first, second = str(caught.value).splitlines()
    free = int(first.partition(", and ")[2].partition(" bytes")[0].replace(",", ""))
    assert 80 * PAGE < free <= 100 * PAGE
    assert "Up to 3 checkpoints of " in second and "--ignore_plan" in second
    assert not (disk / "fast" / "sft" / "stage.json").exists()
    # the estimate matches what the finished run takes
    stage = start / "runs" / "fast" / "sft"
    took = folder_size(stage) + folder_size(stage / "checkpoints" / f"checkpoint-{STEPS}")
    needed = int(first.partition(" needs ")[2].partition(" bytes")[0].replace(",", ""))
    assert 0.9 * needed < took < 1.02 * needed


@pytest.mark.parametrize(
    ("optim", "lora"),
    [
        ("adamw_torch_fused", True),
        ("adamw_bnb_8bit", False),
        ("lion_32bit", False),
        ("adafactor", False),
        ("sgd", False),
        ("ademamix_8bit", True),
    ],
)
def test_sizes_are_those_of_the_files(make_model, tmp_path, optim, lora):
    model = make_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), optim=optim, use_cpu=True))
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path)
    assert 0 <= folder_size(tmp_path) - checkpoint_size(model, optim) <= SMALL_FILES


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_total_limit": 2, "save_steps": 0.25}, 3),
        ({"save_total_limit": 2, "save_steps": 100}, 2),  # one save, and one after a signal
        ({"save_steps": 30}, 5),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "save_total_limit": 3}, 4),
        ({"save_total_limit": 1, "metric_for_best_model": "loss"}, 3),
    ],
)
def test_the_most_checkpoints_at_a_time(settings, count):
    assert most_checkpoints(settings, 100) == count


def test_an_error_not_caused_by_the_disk_passes(tmp_path):
    for error in (ConnectionResetError(104, "reset"), ValueError("No"), DataError("No space left")):
        with pytest.raises(type(error)) as caught, writing_to(tmp_path):
            raise error
        assert caught.value is error
