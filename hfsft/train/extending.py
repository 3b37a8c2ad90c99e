"""From which checkpoint a stage can go on to another `max_steps` than it was begun with."""

import os
import shutil
from pathlib import Path
from typing import Any

from hfsft.errors import CheckpointError, RecipeError
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.checkpoint import checkpoints, newest_whole, step_of, verify
from hfsft.run.record import LOGS, settings_of, write_record
from hfsft.train.schedule import STABLE, shared_steps


def go_on_to(stage: Stage, record: dict[str, Any]) -> Path | None:
    """Find the checkpoint from which a stage goes on to another `max_steps`.

    Args:
        stage: with the new `max_steps`.
        record: its `stage.json`, with the former.

    Returns:
        A checkpoint that newer ones are in the way of, see `make_room`; None if the newest does.

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
        newest, _ = newest_whole(stage.checkpoints)
        return checkpoint if finished or newest != checkpoint else None
    schedule = stage.trainer.get("lr_scheduler_type", "linear")
    why = f"no checkpoint of its first {shared} steps is left"
    if shared < 1:
        why = f"with the schedule {schedule} every step has another learning rate then"
    raise RecipeError(
        f"{stage.folder} was begun with max_steps {before} and cannot go on to {now}: {why}\n"
        f"  lr_scheduler_type: {STABLE} keeps a checkpoint to go on from; now give this run "
        "another --name, or pass --restart, which moves the old stage aside"
    )


def make_room(recipe: Recipe, stage: Stage, record: dict[str, Any], checkpoint: Path) -> Path:
    """Move a stage aside, and begin it again with one of its checkpoints and its logs.

    Args:
        recipe: whose stage.
        stage: with the new `max_steps`.
        record: its `stage.json`.
        checkpoint: of it, that the stage goes on from.

    Returns:
        The folder that the stage is in now.
    """
    fresh = _fresh(stage).with_name(f"{stage.name}.longer.partial")
    shutil.rmtree(fresh, ignore_errors=True)  # ours, of a command that was killed
    (fresh / "checkpoints").mkdir(parents=True)
    try:
        shutil.copytree(checkpoint, fresh / "checkpoints" / checkpoint.name, copy_function=os.link)
    except OSError:  # a disk without hard links
        shutil.rmtree(fresh / "checkpoints" / checkpoint.name, ignore_errors=True)
        shutil.copytree(checkpoint, fresh / "checkpoints" / checkpoint.name)
    for name in LOGS:
        if (stage.folder / name).is_file():
            shutil.copy(stage.folder / name, fresh / name)
    settings = settings_of(recipe, stage)
    write_record(
        fresh,
        record | {"status": "interrupted", "max_steps": stage.max_steps, "settings": settings},
    )
    fresh = fresh.rename(_fresh(stage))  # it is whole
    aside = move_aside(stage.folder)
    fresh.rename(stage.folder)
    return aside


def finish_make_room(stage: Stage) -> None:
    """Do what a `make_room` that was killed between its two renames has left."""
    if _fresh(stage).is_dir() and not stage.folder.exists():
        _fresh(stage).rename(stage.folder)
    shutil.rmtree(_fresh(stage), ignore_errors=True)  # one that was not needed


def _fresh(stage: Stage) -> Path:
    return stage.folder.with_name(f"{stage.name}.longer")


def move_aside(folder: Path) -> Path:
    """Give a stage's folder a name that is free; returns it."""
    count = 1
    while (aside := folder.with_name(f"{folder.name}.old-{count}")).exists():
        count += 1
    return folder.rename(aside)
