"""Train a stage from its newest valid checkpoint, or from the start, and keep its record true."""

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import torch
import yaml

from hfsft.errors import Interrupted, MemoryShortage, first_line
from hfsft.model.compiling import compiled_for
from hfsft.process_group import from_main
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.files import write_text_atomically
from hfsft.run.manifest import newest_valid, step_of
from hfsft.run.record import write_record
from hfsft.train.agreement import receive_checkpoint
from hfsft.train.measuring import figures, joules, new_record, peak_memory
from hfsft.train.step import FITTING, StepAbandoned


def train_with_record(trainer: Any, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Train; on failure or interruption write the status to `stage.json`.

    Returns:
        The record, which a finished stage writes once its model is saved.

    Raises:
        MemoryShortage: if memory runs out where no smaller micro-batch helps.
    """
    is_main, device = trainer.is_world_process_zero(), trainer.args.device
    record = new_record(trainer, recipe, stage)
    trainer.manifest_facts["record"] = record  # a copy of it, in case stage.json is lost
    if is_main:
        _write_recipe(recipe)
        write_record(stage.folder, record)
    before = optional(trainer, "energy", lambda: joules(device))
    try:
        try:
            trainer.require_finite()
            _train(trainer, stage)
        except StepAbandoned:
            trainer.save_if_new()
        except torch.OutOfMemoryError as error:  # of an update or a sample answer: no retry
            raise MemoryShortage(
                f"{stage.name}: out of memory after step {trainer.state.global_step}: "
                f"{first_line(error)}\n  {FITTING}"
            ) from None
        if trainer.stop_signal.received and not trainer.is_complete():
            record["status"] = "interrupted"
            raise _interrupted(trainer, stage)
        record["status"] = "finished"
    except BaseException:
        if record["status"] == "running":
            record["status"] = "failed"
        raise
    finally:
        optional(trainer, "the progress bar", trainer.console.close)
        trainer.stop_signal.restore_handlers()
        record |= figures(trainer)
        record |= optional(trainer, "peak memory", lambda: peak_memory(device)) or {
            "peak_memory_bytes": None,
            "peak_memory_of": None,
            "peak_allocated_bytes": None,
        }
        after = optional(trainer, "energy", lambda: joules(device))
        # energy is only known for one uninterrupted run on one GPU
        counted = None not in (before, after) and trainer.args.world_size == 1
        if record["status"] == "finished":
            resumed = trainer.resumed_from is not None
            record["energy_joules"] = round(after - before, 1) if counted and not resumed else None
        elif is_main:
            with contextlib.suppress(OSError):  # of a full disk; the error before it is reported
                write_record(stage.folder, record)
    return record


def optional(trainer: Any, what: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, or None if it fails: that must not lose a finished training."""
    try:
        return make()
    except Exception as error:
        trainer.say(f"{trainer.stage.name}: {what} failed: {first_line(error)}")
        return None


def _train(trainer: Any, stage: Stage) -> None:
    """Train from the newest valid checkpoint, and validate where that is still due."""
    checkpoint, skipped = from_main(
        lambda: newest_valid(stage.checkpoints), "verifies the checkpoints", stage.quiet
    )
    for problem in skipped:
        trainer.say(f"skipping an invalid checkpoint: {problem}")
    trainer.metrics_log.share_lines()
    trainer.args.eval_on_start = stage.validates
    if checkpoint is not None:
        checkpoint = receive_checkpoint(stage, checkpoint)
        trainer.prepare_resume(checkpoint)
        trainer.say(f"{stage.name}: resuming from {checkpoint}")
        trainer.args.eval_on_start = trainer.validation_is_due(step_of(checkpoint))
    try:
        with compiled_for(stage):
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
        f"{reached} of {trainer.args.max_steps}, saved in "
        f"{stage.checkpoints / f'checkpoint-{step}'}\n"
        "  The same command resumes from there",
        number,
    )


def _write_recipe(recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)
    write_text_atomically(recipe.folder / "recipe.yaml", text)
