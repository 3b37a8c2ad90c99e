"""What a run left on disk, finished or not, as plain data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from hfsft.errors import HfsftError
from hfsft.recipe.schema import STAGES

INTERVAL = 1.96  # standard errors to either side of a 95% interval


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's records, logs, audits, sample answers and evaluations; nothing is computed anew.

    Args:
        folder: of the run.

    Returns:
        `run`, `recipe` (resolved), `recipe_text`, and `stages`: name → what `read_stage` returns,
        or None for a stage of the recipe that has not begun.

    Raises:
        HfsftError: if the folder is no run, or a file of it cannot be read.
    """
    try:
        begun = {name: read_stage(folder / name) for name in STAGES}
        path = folder / "recipe.yaml"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        recipe = yaml.safe_load(text) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise HfsftError(f"{folder} cannot be read: {' '.join(str(error).split())}") from None
    if not any(begun.values()):
        inside = (folder / "stage.json").is_file()
        hint = f"; its run is {folder.absolute().parent}" if inside else ""
        raise HfsftError(
            f"{folder} is no run: it holds no base, mid or sft with a stage.json{hint}"
        )
    stages = {name: stage for name, stage in begun.items() if stage or name in recipe}
    return {"run": str(folder), "recipe": recipe, "recipe_text": text, "stages": stages}


def read_stage(folder: Path) -> dict[str, Any] | None:
    """Read what a stage left, or None where there is nothing.

    Returns:
        `record` (its stage.json), `audit` (data.json) and `evaluation` (eval.json) or None,
        `training`, `validation`, `advice` and `samples` as lists of lines, and `reached`: the
        figures at its last step, out of the log where the record was never closed.
    """
    record = _read_json(folder / "stage.json")
    if record is None:
        return None
    lines = read_lines(folder / "metrics.jsonl")
    stage = {
        "record": record,
        "audit": _read_json(folder / "data.json"),
        "evaluation": _read_json(folder / "eval.json"),
        "training": [line for line in lines if "loss" in line],
        "validation": [line for line in lines if "eval_loss" in line],
        "advice": [line for line in lines if "advice" in line],
        "samples": read_lines(folder / "samples.jsonl"),
    }
    return stage | {"reached": _reached(record, lines, stage)}


def _reached(
    record: dict[str, Any], lines: list[dict[str, Any]], stage: dict[str, Any]
) -> dict[str, Any]:
    last = lines[-1] if lines else {"step": 0, "tokens": 0, "seconds": 0.0}
    validation, speeds = stage["validation"], [speed for _, speed in speeds_of(stage)]
    memory = [line["memory_bytes"] for line in stage["training"] if line.get("memory_bytes")]
    figures = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "peak_memory_bytes": max(memory, default=None),
        "eval_seconds": sum(line.get("eval_seconds") or 0 for line in validation),
        "sample_seconds": sum(line.get("sample_seconds") or 0 for line in validation),
        "train_loss": stage["training"][-1]["loss"] if stage["training"] else None,
        "eval_loss_before": validation[0]["eval_loss"] if validation else None,
        "eval_loss": validation[-1]["eval_loss"] if validation else None,
        "energy_joules": None,
    }
    figures |= {key: record[key] for key in figures if record.get(key) is not None}
    if len(validation) < 2:  # it came no further than the one before the first step
        figures["eval_loss"] = None
    return figures | {
        "eval_loss_error": validation[-1].get("eval_loss_error") if validation else None,
        "tokens_per_second": median(speeds) if speeds else None,
    }


def speeds_of(stage: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds since the stage's first step, and tokens a second up to there since the line before.

    The time of validations and of sample answers is left out, as far as the log tells it.
    """
    found, tokens, seconds, validating = [], 0, 0.0, 0.0
    lines = sorted([*stage["validation"], *stage["training"]], key=lambda line: line["seconds"])
    for line in lines:
        if "eval_loss" in line:
            validating += sum(line.get(key) or 0.0 for key in ("eval_seconds", "sample_seconds"))
            continue
        took = line["seconds"] - seconds - validating
        if took > 0:
            found.append((line["seconds"], (line["tokens"] - tokens) / took))
        tokens, seconds, validating = line["tokens"], line["seconds"], 0.0
    return found


def validated_sources(stage: dict[str, Any]) -> list[str]:
    """The sources that have a validation loss of their own, as `eval_SOURCE_loss`."""
    found = [re.fullmatch("eval_(.+)_loss", key) for line in stage["validation"] for key in line]
    return list(dict.fromkeys(match[1] for match in found if match))


def accuracies(stage: dict[str, Any]) -> dict[str, Any]:
    """Task → its figures in eval.json, of the tasks with right and wrong answers."""
    tasks = stage["evaluation"]["tasks"] if stage["evaluation"] else {}
    return {name: task for name, task in tasks.items() if "accuracy" in task}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; one that a kill has cut short is left out.

    What is no finite number becomes None.
    """
    return list(_lines(path)) if path.is_file() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines ends at U+2028 too
        try:
            yield json.loads(line, parse_constant=lambda name: None)
        except ValueError:
            continue


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
