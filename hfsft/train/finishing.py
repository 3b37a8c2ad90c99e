"""Train a stage and leave a complete model folder: the model first, everything else after it."""

import signal
from pathlib import Path
from typing import Any

from hfsft.errors import Interrupted
from hfsft.hub.push import report_pushes
from hfsft.model.loading import merged_model, name_base, write_rope_theta
from hfsft.plan.sizes import SMALL_FILES, checkpoint_size, model_size, most_checkpoints
from hfsft.process import Stopped
from hfsft.process_group import meet
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.disk import require_room, shown, writing_to
from hfsft.run.files import remove, write_text_atomically
from hfsft.run.manifest import MANIFEST, PARTIAL, clear, seal
from hfsft.run.record import write_record
from hfsft.run.results import forgetting, general_changes
from hfsft.train.card import model_card
from hfsft.train.folder import lock_stage
from hfsft.train.generation import write_generation_config
from hfsft.train.resuming import optional, train_with_record


def train_and_save(trainer: Any, recipe: Recipe, stage: Stage) -> None:
    """Train, validate, and leave a complete model folder in the Hub format, its record and card.

    Raises:
        Interrupted: after a signal, once a checkpoint is on disk.
        CheckpointError: if there are checkpoints and none verifies, or none can be written.
        DiskShortage: if the disk has no room for it, or runs full.
    """
    with writing_to(stage.folder):
        lock = lock_stage(stage)
        try:
            if trainer.is_world_process_zero() and not recipe.ignore_plan:
                _require_room(trainer, stage)
            record = train_with_record(trainer, recipe, stage)
            _save_stage(trainer, stage, record)
            if trainer.is_world_process_zero():
                lock.release()
                _push(trainer, stage)
            # other machines must not look for the next stage's store while this one's is up
            meet("pushes", stage.quiet)
        finally:
            lock.release()


def _require_room(trainer: Any, stage: Stage) -> None:
    """Refuse to train what the disk has no room for, by the sizes of the model that is loaded."""
    small = SMALL_FILES + len(trainer.processing_class.backend_tokenizer.to_str())
    optim = stage.trainer.get("optim", str(trainer.args.optim.value))
    one = small + checkpoint_size(trainer.model, optim)
    count = most_checkpoints(stage.trainer, trainer.args.max_steps)
    final = small + model_size(trainer.model)
    contents = f"Up to {count} checkpoints of {shown(one)} and the model of {shown(final)}"
    require_room(stage.name, stage.folder, count * one + final, contents)


# --- the finished model ---


def _save_stage(trainer: Any, stage: Stage, record: dict[str, Any]) -> None:
    """Save the model, then its card and record; every rank calls it."""
    trainer.require_finite()
    partial, is_main = stage.checkpoints / PARTIAL, trainer.is_world_process_zero()
    if is_main:
        clear(stage.checkpoints)  # of a save that was interrupted
    _save_model(trainer, stage, partial)
    if not is_main:
        return
    write_rope_theta(partial / "config.json")
    write_generation_config(partial, stage, trainer.model.config, trainer.processing_class)
    seal(partial, {"record": record})
    _move_into(stage.folder, partial)
    optional(
        trainer,
        "the model card",
        lambda: write_text_atomically(stage.folder / "README.md", model_card(stage, record)),
    )
    write_record(stage.folder, record)
    trainer.say(_summary(stage, record, trainer.state.global_step))
    if changes := general_changes(trainer.metrics_log.validation.lines):
        trainer.say(f"{stage.name}: {forgetting(changes)}")


def _save_model(trainer: Any, stage: Stage, folder: Path) -> None:
    """Save the plain model to a folder; a LoRA run's adapter beside it."""
    trainer.model.config.use_cache = True  # Trainer turned it off, generation needs it
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
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = merged_model(adapter, stage, model, sharded=trainer.is_fsdp_enabled)
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def _move_into(folder: Path, partial: Path) -> None:
    """Move a saved model into the stage's folder; config.json, which makes it one, near the end."""
    remove(folder / "adapter")  # of a move that was interrupted
    last = ("config.json", MANIFEST)
    for made in sorted(
        partial.iterdir(), key=lambda made: last.index(made.name) if made.name in last else -1
    ):
        made.rename(folder / made.name)
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


def _push(trainer: Any, stage: Stage) -> None:
    """Push the finished model, and report every push of the stage."""
    if trainer.pusher is None:
        return
    try:
        trainer.say(f"{stage.name}: pushing to {trainer.pusher.target.repo_id}")
        trainer.pusher.model(stage.folder)
        pushes = trainer.pusher.finish()
    except (KeyboardInterrupt, Stopped) as stop:
        raise Interrupted(
            f"{stage.name}: stopped during the push; the model is finished in {stage.folder}\n"
            f"  To resume the push: hfsft push {stage.folder}",
            getattr(stop, "number", signal.SIGINT),
        ) from None
    report_pushes(pushes, stage.folder, trainer.say)
