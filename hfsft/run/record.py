"""A stage's `stage.json`: what was run with which settings, and whether it may go on."""

import json
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError
from hfsft.recipe.schema import HUB_KEYS, Recipe, Stage
from hfsft.run.files import write_text_atomically

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
    "log_level_replica",
    "log_on_each_node",
    "dataset_num_proc",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "torch_empty_cache_steps",
    # what is kept and what is computed again: the same numbers, seen to the bit
    "activation_checkpointing",
    "gradient_checkpointing",
    # how a step is cut up, and how it ends: its sum is the same, to rounding
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "memory_limit",
    "on_save_error",
    "max_bad_steps",
    *HUB_KEYS,
}


# of these, what cuts a sum into other parts
ROUNDED = {"per_device_train_batch_size"}


# of a stage's folder, what a run that goes on adds to
LOGS = ("metrics.jsonl", "validation.jsonl", "samples.jsonl", "bad_steps.jsonl")


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


def changed_keys(
    before: dict[str, Any], now: dict[str, Any], prefix: str = "", free: bool = False
) -> list[str]:
    """The dotted keys whose values differ, those apart that leave the result alone; or only those.

    Args:
        before: settings, as `settings_of` gives them.
        now: the others.
        prefix: of the keys.
        free: whether those are meant that leave the result alone.
    """
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += changed_keys(old, new, f"{prefix}{key}.", free)
        elif old != new and (key in FREE_KEYS) == free:
            changed.append(f"{prefix}{key}")
    return changed


def going_on_line(stage: Stage, before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What is said of a run that goes on with other settings, if it does."""
    keys = [key.rpartition(".")[2] for key in changed_keys(before, now, free=True)]
    if not keys:
        return None
    line = f"{stage.name}: going on with other {', '.join(keys)}"
    if ROUNDED & set(keys):
        line += "; sums of other parts are rounded otherwise, in the last digits"
    return line


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
    if only_longer(stage, changed):
        return False
    if changed:
        raise other_settings(stage, "finished", changed)
    return True


def only_longer(stage: Stage, changed: list[str]) -> bool:
    """Whether nothing changed but `max_steps`: it may go on, see `going_on.go_on_to`."""
    return changed == [f"{stage.name}.max_steps"] and stage.max_steps is not None


def other_settings(stage: Stage, done: str, changed: list[str]) -> RecipeError:
    """The error of a folder whose stage was `done` with settings that differ in `changed` keys."""
    shown = ("the model it starts from" if key.startswith("start") else key for key in changed)
    return RecipeError(
        f"{stage.folder} was {done} with other settings: {', '.join(dict.fromkeys(shown))}\n"
        "  Give this run another --name, or pass --restart, which moves the old stage aside"
    )


def finished_line(stage: Stage) -> str:
    """What is said of a stage that needs no more training."""
    return f"{stage.name}: finished already in {stage.folder}; --restart trains it anew"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a stage's `stage.json` atomically."""
    write_text_atomically(folder / "stage.json", json.dumps(record, indent=1) + "\n")
