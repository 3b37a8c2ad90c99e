"""Extending a stage: resume with another `max_steps` from a step that both schedules share."""

import os
import shutil
from pathlib import Path
from typing import Any

from hfsft.errors import CheckpointError, RecipeError
from hfsft.process_group import from_main
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.files import remove
from hfsft.run.manifest import checkpoints, newest_valid, step_of, verify
from hfsft.run.record import LOGS, settings_of, write_record
from hfsft.terminal import say
from hfsft.train.folder import lock_stage, move_aside
from hfsft.train.schedule import STABLE, shared_steps


def extend(recipe: Recipe, stage: Stage, record: dict[str, Any]) -> None:
    """Make a stage ready to resume with another `max_steps`; every rank calls it.

    Newer checkpoints and a finished model are moved aside with the old folder, not deleted.

    Args:
        recipe: whose stage.
        stage: with the new `max_steps`.
        record: its `stage.json`, with the old one.

    Raises:
        RecipeError: if no checkpoint can be resumed from, with the reason.
    """
    checkpoint = from_main(lambda: checkpoint_to_extend(stage, record))
    if checkpoint is None:
        return
    lock_stage(stage).release()  # a collective

    def begin() -> None:
        # the record of a stage that was killed has no steps
        reached = record.get("steps", step_of(checkpoints(stage.checkpoints)[0]))
        aside = begin_from(recipe, stage, record, checkpoint)
        if not stage.quiet:
            say(
                f"{stage.name}: resuming from step {step_of(checkpoint)}, up to {stage.max_steps}; "
                f"what was trained to step {reached} is now in {aside}"
            )

    from_main(begin)


def checkpoint_to_extend(stage: Stage, record: dict[str, Any]) -> Path | None:
    """Find the checkpoint from which a stage can resume with another `max_steps`.

    Args:
        stage: with the new `max_steps`.
        record: its `stage.json`, with the old one.

    Returns:
        The checkpoint to resume from, if newer ones or a finished model must be moved aside for it
        (see `begin_from`); else None.

    Raises:
        RecipeError: if there is none, with the reason.
    """
    before, now = record["max_steps"], stage.max_steps
    shared = shared_steps(stage, before, now)
    for checkpoint in checkpoints(stage.checkpoints):
        if step_of(checkpoint) > shared:
            continue
        try:
            verify(checkpoint)
        except CheckpointError:
            continue
        finished = record["status"] == "finished"
        newest, _ = newest_valid(stage.checkpoints)
        return checkpoint if finished or newest != checkpoint else None
    schedule = stage.trainer.get("lr_scheduler_type", "linear")
    why = f"no checkpoint of the first {shared} steps is left"
    if shared < 1:
        why = (
            f"with lr_scheduler_type {schedule}, another max_steps changes the learning rate of "
            "every step"
        )
    advice = f"lr_scheduler_type: {STABLE} keeps a checkpoint to resume from; for now give"
    raise RecipeError(
        f"{stage.folder} was started with max_steps {before} and cannot resume to {now}: {why}\n"
        f"  {'Give' if schedule == STABLE else advice} this run another --name, or pass --restart, "
        "which moves the old stage aside"
    )


def begin_from(recipe: Recipe, stage: Stage, record: dict[str, Any], checkpoint: Path) -> Path:
    """Move a stage aside, and put a new folder with one of its checkpoints and its logs in place.

    Args:
        recipe: whose stage.
        stage: with the new `max_steps`.
        record: its `stage.json`.
        checkpoint: of it, that the stage resumes from.

    Returns:
        The folder that holds the old stage now.
    """
    fresh = _prepared_folder(stage).with_name(f"{stage.name}.longer.partial")
    remove(fresh)  # ours, of a command that was killed
    (fresh / "checkpoints").mkdir(parents=True)
    try:
        shutil.copytree(checkpoint, fresh / "checkpoints" / checkpoint.name, copy_function=os.link)
    except OSError:  # a disk without hard links
        remove(fresh / "checkpoints" / checkpoint.name)
        shutil.copytree(checkpoint, fresh / "checkpoints" / checkpoint.name)
    for name in LOGS:
        if (stage.folder / name).is_file():
            shutil.copy(stage.folder / name, fresh / name)
    settings = settings_of(recipe, stage)
    write_record(
        fresh,
        record | {"status": "interrupted", "max_steps": stage.max_steps, "settings": settings},
    )
    fresh = fresh.rename(_prepared_folder(stage))  # complete from here on
    aside = move_aside(stage.folder)
    fresh.rename(stage.folder)
    return aside


def finish_extending(stage: Stage) -> None:
    """Complete a `begin_from` that was killed between its last two renames."""
    prepared = _prepared_folder(stage)
    if prepared.is_dir() and not prepared.is_symlink() and not stage.folder.exists():
        prepared.rename(stage.folder)
    remove(prepared)  # killed before the first of them


def _prepared_folder(stage: Stage) -> Path:
    return stage.folder.with_name(f"{stage.name}.longer")
