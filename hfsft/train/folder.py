"""A stage's folder: one run at a time, and moved aside instead of deleted."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from hfsft.errors import RecipeError
from hfsft.recipe.schema import Stage
from hfsft.run.files import first_free


def lock_stage(stage: Stage) -> Any:
    """Lock a stage's folder against a second run, until this process ends; every rank calls it.

    Returns:
        The lock, which the main process holds.

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


def move_aside(folder: Path) -> Path:
    """Rename a stage's folder to the first free `NAME.old-N`; returns it."""
    return folder.rename(first_free(folder, "old"))
