"""A stage's `stage.json`: which settings it ran with, and whether it may resume with others."""

import json
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError
from hfsft.recipe.key import FIXED, ROUNDED
from hfsft.recipe.schema import PER_PARAMETER, Recipe, Stage
from hfsft.recipe.sections import on_resume
from hfsft.run.files import write_text_atomically
from hfsft.run.identity import model_digest

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


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `stage.json` of a stage's folder, or None."""
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else None


def is_finished(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage is finished with exactly these settings.

    Raises:
        RecipeError: if it finished with other settings; nothing is touched.
    """
    record = read_record(stage.folder)
    if record is None or record["status"] != "finished":
        return False
    changed = changed_keys(record["settings"], settings_of(recipe, stage))
    if only_longer(stage, changed):
        return False
    if changed:
        raise other_settings(stage, "finished", changed, record["settings"])
    return True


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
    write_text_atomically(folder / "stage.json", json.dumps(record, indent=1) + "\n")
