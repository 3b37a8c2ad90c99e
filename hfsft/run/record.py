"""A stage's `stage.json`: which settings it ran with, and whether it may resume with others."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfsft.errors import CheckpointError, RecipeError
from hfsft.recipe.key import FIXED, ROUNDED, STAGES
from hfsft.recipe.schema import PER_PARAMETER, Recipe, Stage
from hfsft.recipe.sections import on_resume
from hfsft.run.files import first_free, read_small, write_text_atomically
from hfsft.run.identity import model_digest
from hfsft.run.manifest import (
    MANIFEST,
    check_files,
    checkpoints,
    newest_valid,
    read_manifest,
    verify_model,
)

# the files of a stage's folder that a resumed run appends to
LOGS = ("metrics.jsonl", "validation.jsonl", "samples.jsonl", "bad_steps.jsonl")


def settings_of(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The resolved settings that determine the stage's result, and the model it starts from."""
    keys = ["seed", "tokenizer", stage.name] + (["model"] if stage.name == "base" else [])
    settings = {key: recipe.resolved.get(key) for key in keys}
    start = stage.model_name_or_path
    if start is not None:
        # what the model is, not where it lies: a copied run resumes, and an earlier stage that was
        # retrained is a different model in the same folder
        folder = Path(start)
        settings["start"] = {"model": model_digest(folder) if folder.is_dir() else start}
    return settings


def changed_keys(
    before: dict[str, Any], now: dict[str, Any], prefix: str = "", free: bool = False
) -> list[str]:
    """The dotted keys whose values differ and that may not change on resume.

    Args:
        before: settings, as `settings_of` returns them.
        now: the settings to compare with.
        prefix: of the keys that are returned.
        free: return the keys that may change instead.
    """
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += changed_keys(old, new, f"{prefix}{key}.", free)
        elif old != new and (on_resume(key) != FIXED) == free:
            changed.append(f"{prefix}{key}")
    return changed


def resume_notice(stage: Stage, before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The line printed when a stage resumes with changed settings; None if nothing changed."""
    keys = [key.rpartition(".")[2] for key in changed_keys(before, now, free=True)]
    if not keys:
        return None
    line = f"{stage.name}: resuming with changed {', '.join(keys)}"
    if ROUNDED in map(on_resume, keys):
        line += "; sums are grouped differently, so the last digits may change"
    return line


RECORD = "stage.json"

STATUSES = ("running", "interrupted", "finished", "failed")


def read_record(
    folder: Path, parse_constant: Callable[[str], Any] | None = None
) -> dict[str, Any] | None:
    """The `stage.json` of a stage's folder, or None.

    One that is missing, cut or of something else is read from the copy in the manifest of the
    finished model, or else of the newest valid checkpoint.

    Args:
        folder: the stage's.
        parse_constant: of `json.loads`, for NaN and Infinity.

    Raises:
        CheckpointError: if it cannot be read, and neither manifest has a copy of it.
    """
    record = _written_record(folder / RECORD, parse_constant)
    if record is not None:
        return record
    try:
        copy = read_manifest(folder).get("record")
        if _is_record(copy):
            return copy
    except CheckpointError:
        pass
    found = checkpoints(folder / "checkpoints")
    if found:
        newest, _ = newest_valid(folder / "checkpoints")
        copy = read_manifest(newest).get("record")
        if _is_record(copy):
            return copy | {"status": "interrupted"}
    # elsewhere it may be another tool's; without a checkpoint or a model it is nothing's record
    ours = folder.name in STAGES and (found or (folder / "config.json").is_file())
    if ours and os.path.lexists(folder / RECORD):
        raise CheckpointError(
            f"{folder / RECORD}: cannot be read, and there is no copy of it in a {MANIFEST}\n"
            "  Put it back, or pass --restart, which moves the stage aside and trains it again"
        )
    return None


def _written_record(
    path: Path, parse_constant: Callable[[str], Any] | None = None
) -> dict[str, Any] | None:
    """The record in a file, or None if there is none that can be read."""
    try:
        record = json.loads(read_small(path), parse_constant=parse_constant)
    except (OSError, ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(held: Any) -> bool:
    return (
        isinstance(held, dict)
        and held.get("stage") in STAGES
        and held.get("status") in STATUSES
        and isinstance(held.get("settings"), dict)
    )


def mend_record(folder: Path) -> str | None:
    """Write a lost or damaged `stage.json` again from its copy, moving what is there aside.

    Args:
        folder: a stage's.

    Returns:
        The line to print, or None where nothing was done.

    Raises:
        CheckpointError: as `read_record`.
    """
    path = folder / RECORD
    if _written_record(path) is not None:
        return None
    record = read_record(folder)
    if os.path.lexists(path):
        path.rename(first_free(path, "broken"))
    if record is None:
        return None
    write_record(folder, record)
    return f"{record['stage']}: {path} could not be read; it was written again from its copy"


def is_finished(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage is finished with exactly these settings, its model as it was written.

    Raises:
        RecipeError: if it finished with other settings; nothing is touched.
        CheckpointError: if a file of its model differs from what was written. One whose files are
            only missing is not finished where a checkpoint has them.
    """
    record = read_record(stage.folder)
    if record is None or record["status"] != "finished":
        return False
    changed = changed_keys(record["settings"], settings_of(recipe, stage))
    if only_longer(stage, changed):
        return False
    if changed:
        raise other_settings(stage, "finished", changed, record["settings"])
    return _model_is_whole(stage)


def _model_is_whole(stage: Stage) -> bool:
    """Whether the files of a finished model are there; False if a checkpoint can replace them.

    Raises:
        CheckpointError: if they are not, and none can; or if one differs.
    """
    try:
        listed = read_manifest(stage.folder)["files"]
    except CheckpointError:
        listed = {}  # by an earlier version, or deleted
    missing = sorted(name for name in listed if not (stage.folder / name).is_file())
    if not listed and not any(stage.folder.glob("*.safetensors")):
        missing = ["model.safetensors"]
    if not missing:
        verify_model(stage.folder)
        return True
    # what is there is overwritten with the same bytes, so nothing of the user's is lost
    check_files(stage.folder, {name: listed[name] for name in listed if name not in missing})
    checkpoint, _ = newest_valid(stage.checkpoints)
    if checkpoint is None:
        raise CheckpointError(
            f"{stage.folder}: {missing[0]} is missing, and there is no checkpoint to write it from"
            "\n  --restart moves the stage aside and trains it again"
        )
    return False


def only_longer(stage: Stage, changed: list[str]) -> bool:
    """Whether only the number of steps changed: `train.extending` can extend such a stage."""
    keys = {f"{stage.name}.{key}" for key in ("max_steps", *PER_PARAMETER)}
    return bool(changed) and keys.issuperset(changed) and stage.max_steps is not None


def other_settings(
    stage: Stage, done: str, changed: list[str], before: dict[str, Any]
) -> RecipeError:
    """The error for a folder whose stage was `done` with settings that differ in `changed` keys."""

    def shown(key: str) -> str:
        value: Any = before
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if key.startswith("start"):
            return "the model it starts from"
        # what to pass to get the old stage; lists, such as data, are too long to show
        return key if isinstance(value, list | dict) else f"{key} (was {json.dumps(value)})"

    shown_keys = dict.fromkeys(map(shown, changed))
    return RecipeError(
        f"{stage.folder} was {done} with other settings: {', '.join(shown_keys)}\n"
        "  Give this run another --name, or pass --restart, which moves the old stage aside"
    )


def finished_line(stage: Stage) -> str:
    """The line printed for a stage that needs no more training."""
    return f"{stage.name}: finished already in {stage.folder}; --restart trains it again"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a stage's `stage.json` atomically."""
    write_text_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
