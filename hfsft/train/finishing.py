"""Train a stage and leave a complete model folder."""

import contextlib
import json
import resource
import shlex
import shutil
import signal
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from hfsft.errors import Interrupted, RecipeError
from hfsft.hub.push import report_pushes
from hfsft.model.loading import merged_model, name_base
from hfsft.plan.sizes import SMALL_FILES, checkpoint_size, model_size, most_checkpoints
from hfsft.process import Stopped
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.checkpoint import PARTIAL, checkpoints, clear, newest_whole, step_of
from hfsft.run.disk import require_room, shown, writing_to
from hfsft.run.files import write_text_atomically
from hfsft.run.record import read_record, settings_of, write_record
from hfsft.train.card import model_card
from hfsft.train.step import StepAbandoned

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes")


def train_and_save(trainer: Any, recipe: Recipe, stage: Stage) -> None:
    """Train, validate, and leave a whole model folder in the Hub format with its record and card.

    Raises:
        Interrupted: after a signal, once a checkpoint is on disk.
        CheckpointError: if there are checkpoints and none is whole, or none can be written.
        DiskShortage: if the disk has no room for it, or runs full.
    """
    with writing_to(stage.folder):
        lock = lock_stage(stage)
        try:
            _train_and_save(trainer, recipe, stage, lock)
        finally:
            lock.release()


def _train_and_save(trainer: Any, recipe: Recipe, stage: Stage, lock: FileLock) -> None:
    is_main = trainer.is_world_process_zero()
    if is_main and not recipe.ignore_plan:
        _require_room(trainer, stage)
    record = _new_record(trainer, recipe, stage)
    if is_main:
        _write_recipe(recipe)
        write_record(stage.folder, record)
    energy = _energy(trainer.args.device)
    try:
        try:
            _train(trainer, stage)
        except StepAbandoned:
            trainer.save_if_new()
        if trainer.stop_signal.received and not trainer.is_complete():
            record["status"] = "interrupted"
            raise _interrupted(trainer, stage)
        record["status"] = "finished"
        record["energy_joules"] = _energy_since(trainer, energy)
    except BaseException:
        if record["status"] == "running":
            record["status"] = "failed"
        raise
    finally:
        trainer.console.close()
        trainer.stop_signal.give_back()
        record |= _measured(trainer)
        if is_main and record["status"] != "finished":
            with contextlib.suppress(OSError):  # of a full disk; what came before is to be told
                write_record(stage.folder, record)
    partial = stage.checkpoints / PARTIAL
    if is_main:
        clear(stage.checkpoints)  # of a save that was broken off
    _save_model(trainer, stage, partial)
    if is_main:
        _finish_folder(stage, partial, record)
        write_record(stage.folder, record)
        lock.release()
        if not stage.quiet:
            print(_summary(stage, record, trainer.state.global_step))
        if trainer.pusher is not None:
            try:
                trainer.say(f"{stage.name}: pushing to {trainer.pusher.target.repo_id}")
                trainer.pusher.model(stage.folder)
                pushes = trainer.pusher.finish()
            except (KeyboardInterrupt, Stopped) as stop:
                raise Interrupted(
                    f"{stage.name}: stopped while it was pushed; it is finished in {stage.folder}\n"
                    f"  To go on with it: hfsft push {stage.folder}",
                    getattr(stop, "number", signal.SIGINT),
                ) from None
            report_pushes(pushes, stage.folder, trainer.say)


def _require_room(trainer: Any, stage: Stage) -> None:
    """Refuse to train what the disk has no room for, by the sizes of the model that is loaded."""
    small = SMALL_FILES + len(trainer.processing_class.backend_tokenizer.to_str())
    one = small + checkpoint_size(trainer.model, str(trainer.args.optim.value))
    count = most_checkpoints(stage.trainer, trainer.args.max_steps)
    final = small + model_size(trainer.model)
    contents = f"Up to {count} checkpoints of {shown(one)} and the model of {shown(final)}"
    require_room(stage.name, stage.folder, count * one + final, contents)


def lock_stage(stage: Stage) -> Any:
    """Keep a second run out of a stage's folder; the lock goes with this process, however it ends.

    Returns:
        The lock, held by the main process alone.

    Raises:
        RecipeError: if another process holds it.
    """
    held = []
    lock = FileLock(stage.checkpoints / ".lock")
    if PartialState().is_main_process:
        stage.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held.append(str(stage.folder))
    if gather_object(held):
        raise RecipeError(
            f"{stage.folder}: another run is training it; wait for it, or give this one a --name"
        )
    return lock


def _train(trainer: Any, stage: Stage) -> None:
    """Train from the newest whole checkpoint on, and validate where that is still due."""
    checkpoint, passed_over = newest_whole(stage.checkpoints)
    for problem in passed_over:
        trainer.say(f"passed over: {problem}")
    trainer.args.eval_on_start = stage.validates
    if checkpoint is not None:
        trainer.take_up(checkpoint)
        trainer.say(f"{stage.name}: going on from {checkpoint}")
        trainer.args.eval_on_start = trainer.validation_is_due(step_of(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except StepAbandoned:
        if not trainer.has_every_step() or trainer.stop_signal.received:
            raise
    if trainer.has_every_step() and not trainer.is_complete():
        trainer.evaluate()


def _interrupted(trainer: Any, stage: Stage) -> Interrupted:
    number, step = trainer.stop_signal.received, trainer.state.global_step
    reached = f"{stage.name} stopped by {signal.Signals(number).name} at step {step}"
    if step == 0:
        return Interrupted(f"{reached}, before there was anything to save", number)
    return Interrupted(
        f"{reached} of {trainer.args.max_steps}, saved in {checkpoints(stage.checkpoints)[0]}\n"
        "  The same command goes on from there",
        number,
    )


def _new_record(trainer: Any, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    start = read_record(Path(stage.model_name_or_path)) if stage.model_name_or_path else None
    return {
        "stage": stage.name,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_steps": trainer.args.max_steps,
        "examples_per_step": trainer.get_total_train_batch_size(trainer.args),
        "device": _device_name(trainer.args.device),
        "processes": trainer.args.world_size,
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": {name: version(name) for name in ("hfsft", *LIBRARIES)},
        "recipe": recipe.path,
        "command": shlex.join(["hfsft", stage.name, recipe.path, *_lasting(recipe.arguments)]),
        "settings": settings_of(recipe, stage),
        "chosen": stage.chosen,
        "plan": stage.plan,
        "lineage": {
            "model": stage.model_name_or_path,
            "revision": stage.revision,
            "stage": start and {key: start[key] for key in ("stage", "steps", "lineage")},
        },
    }


def _measured(trainer: Any) -> dict[str, Any]:
    """What the run took and reached, as far as it came."""
    log, state = trainer.metrics_log, trainer.state
    losses, validation = log.values("loss"), log.values("eval_loss")
    if trainer.args.device.type == "cuda":
        memory = torch.cuda.max_memory_reserved()
    else:  # kilobytes on Linux, bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "steps": state.global_step,
        "micro_batch_rows": trainer.rows,
        "examples": state.global_step * trainer.get_total_train_batch_size(trainer.args),
        "tokens": state.num_input_tokens_seen,
        "seconds": round(log.seconds(), 1) if log.began else 0.0,
        "train_loss": losses[-1] if losses else None,
        "eval_loss": validation[-1] if validation else None,
        "eval_loss_before": validation[0] if validation else None,
        "eval_seconds": round(sum(log.values("eval_seconds")), 1),
        "stopped_at": "plateau" if trainer.is_at_plateau() else None,
        "peak_memory_bytes": memory,
        "peak_memory_of": "GPU reserved" if trainer.args.device.type == "cuda" else "process",
        # what the plan without its overhead is held against
        "peak_allocated_bytes": torch.cuda.max_memory_allocated()
        if trainer.args.device.type == "cuda"
        else None,
    }


def _lasting(arguments: tuple[str, ...]) -> list[str]:
    """A command line without `--restart`, which would begin anew what is to go on."""
    kept: list[str] = []
    for index, word in enumerate(arguments):
        value = index > 0 and arguments[index - 1] == "--restart" and not word.startswith("--")
        if not value and word.partition("=")[0] != "--restart":
            kept.append(word)
    return kept


def _energy(device: torch.device) -> float | None:
    """Joules that a GPU has taken since its driver was loaded; None where it does not tell."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None


def _energy_since(trainer: Any, before: float | None) -> float | None:
    """Joules of a stage that one command ran on one GPU from beginning to end; else not known."""
    if before is None or trainer.place is not None or trainer.args.world_size > 1:
        return None
    return round(_energy(trainer.args.device) - before, 1)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _save_model(trainer: Any, stage: Stage, folder: Path) -> None:
    """Save the plain model to a folder; a LoRA run's adapter goes beside it."""
    trainer.model.config.use_cache = True  # the trainer turned it off, a chat needs it
    if stage.lora is None:
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            (folder / "training_args.bin").unlink()  # a pickle, and it names this machine
        return
    adapter = folder / "adapter"
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        (adapter / "training_args.bin").unlink()
        (adapter / "README.md").unlink(missing_ok=True)  # peft's empty card
        name_base(adapter, stage)
        model = merged_model(adapter, stage, trainer.accelerator.unwrap_model(trainer.model))
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def _finish_folder(stage: Stage, partial: Path, record: dict[str, Any]) -> None:
    """Complete a model's folder, and move what it holds into the stage's."""
    path = partial / "config.json"
    config = json.loads(path.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in config:
        config["rope_theta"] = theta  # readers before transformers 5 look for it here
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").write_text(model_card(stage, record))
    shutil.rmtree(stage.folder / "adapter", ignore_errors=True)  # of a move that was broken off
    # without its config, which comes last, a folder holds no model
    for made in sorted(partial.iterdir(), key=lambda made: made.name == "config.json"):
        made.rename(stage.folder / made.name)
    partial.rmdir()


def _summary(stage: Stage, record: dict[str, Any], steps: int) -> str:
    loss = ""
    if record["eval_loss"] is not None:
        share = record["eval_seconds"] / max(record["seconds"], 1e-9)
        loss = (
            f" ({share:.0%} of them validating), validation loss "
            f"{record['eval_loss_before']:.4f} → {record['eval_loss']:.4f}"
        )
    stopped = f" of {record['max_steps']:,}, at a plateau" if record["stopped_at"] else ""
    return (
        f"{stage.name}: {steps:,} steps{stopped}, {record['tokens']:,} tokens in "
        f"{record['seconds']:,.0f} s{loss}; saved in {stage.folder}"
    )


def _write_recipe(recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)
    write_text_atomically(recipe.folder / "recipe.yaml", text)
