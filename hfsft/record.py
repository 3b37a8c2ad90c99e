"""A stage's `stage.json`: what was run with which settings, and whether it may go on."""

import json
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError
from hfsft.keys import HUB_KEYS
from hfsft.recipe import Recipe, Stage

# settings that leave the trained bits alone: they may differ when the same command goes on
FREE_KEYS = {
    "logging_steps",
    "logging_first_step",
    "logging_strategy",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "log_level",
    "dataset_num_proc",
    "dataloader_num_workers",
    # how a step is cut up, and how it ends: its sum is the same
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "memory_limit",
    "on_save_error",
    "max_bad_steps",
    *HUB_KEYS,
}


def settings_of(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The resolved settings that the stage's result depends on, and the model it starts from."""
    keys = ["seed", "tokenizer", stage.name] + (["model"] if stage.name == "base" else [])
    settings = {key: recipe.resolved.get(key) for key in keys}
    if stage.model_name_or_path is not None:
        # an earlier stage that was trained anew is another model in the same folder
        earlier = read_record(Path(stage.model_name_or_path))
        started = earlier["started"] if earlier else None
        settings["start"] = {"model": stage.model_name_or_path, "trained": started}
    return settings


def changed_keys(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys whose values differ, those apart that leave the result alone."""
    changed = []
    for key in sorted(before.keys() | now.keys()):
        if key in FREE_KEYS:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}")
    return changed


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `stage.json` of a stage's folder, or None."""
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else None


def is_finished(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage is finished with these very settings.

    Raises:
        RecipeError: if it is finished with other settings; nothing is touched.
    """
    record = read_record(stage.folder)
    if record is None or record["status"] != "finished":
        return False
    changed = changed_keys(record["settings"], settings_of(recipe, stage))
    if changed:
        raise other_settings(stage, "finished", changed)
    return True


def other_settings(stage: Stage, done: str, changed: list[str]) -> RecipeError:
    """The error of a folder whose stage was `done` with settings that differ in `changed` keys."""
    return RecipeError(
        f"{stage.folder} was {done} with other settings: {', '.join(changed)}\n"
        "  Give this run another --name, or pass --restart, which moves the old stage aside"
    )


def finished_line(stage: Stage) -> str:
    """What is said of a stage that needs no more training."""
    return f"{stage.name}: finished already in {stage.folder}; --restart trains it anew"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a stage's `stage.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "stage.json.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(folder / "stage.json")
