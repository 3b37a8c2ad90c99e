"""Read what a run, finished or not, left on disk, as plain data."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from hfsft.errors import HfsftError, first_line
from hfsft.noise import Z95, mean_change
from hfsft.recipe.key import STAGES
from hfsft.run.files import read_json_lines, read_small
from hfsft.run.record import RECORD, read_record

# what JSON of another shape raises where it is used
MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError)


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's records, logs, audits, sample answers and evaluations; no model is run.

    Args:
        folder: the run's.

    Returns:
        `run`, `recipe` (resolved), `recipe_text`, and `stages`: name → what `read_stage` returns,
        or None for a stage of the recipe that has not started.

    Raises:
        HfsftError: if the folder is not a run, or one of its files cannot be read.
    """
    try:
        started = {name: read_stage(folder / name) for name in STAGES}
        path = folder / "recipe.yaml"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        recipe = yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise HfsftError(f"{folder} cannot be read: {' '.join(str(error).split())}") from None
    except MALFORMED as error:
        raise malformed(folder, error) from error
    if not any(started.values()):
        is_stage = (folder / RECORD).is_file()
        hint = f"; its run is {folder.absolute().parent}" if is_stage else ""
        raise HfsftError(
            f"{folder} is not a run: it holds no base, mid or sft with a stage.json{hint}"
        )
    stages = {name: stage for name, stage in started.items() if stage or name in recipe}
    return {"run": str(folder), "recipe": recipe, "recipe_text": text, "stages": stages}


def malformed(folder: Path | str, error: Exception) -> HfsftError:
    """The error for a run whose files lack what hfsft writes there.

    Args:
        folder: the run's, or those of two.
        error: one of `MALFORMED`, raised where a value was used.
    """
    return HfsftError(
        f"{folder}: a file of it is not as hfsft writes it ({type(error).__name__}: "
        f"{first_line(error)})\n"
        "  Compare stage.json, data.json, eval.json and the .jsonl files of its stages with a copy"
    )


def read_stage(folder: Path) -> dict[str, Any] | None:
    """Read a stage's folder; None if it has no stage.json.

    Returns:
        `record` (stage.json); `audit` (data.json) and `evaluation` (eval.json), None if missing;
        `training`, `validation`, `advice` and `samples` as lists of log lines; `general`, what
        `general_changes` returns; and `reached`, the figures at its last step, taken from the log
        if the stage never closed its record.
    """
    record = read_record(folder, parse_constant=lambda name: None)
    if record is None:
        return None
    lines = read_json_lines(folder / "metrics.jsonl", nan_as_none=True)
    stage = {
        "record": record,
        "audit": _read_json(folder / "data.json"),
        "evaluation": _read_json(folder / "eval.json"),
        "training": [line for line in lines if "loss" in line],
        "validation": [line for line in lines if "eval_loss" in line],
        "advice": [line for line in lines if "advice" in line],
        "samples": read_json_lines(folder / "samples.jsonl", nan_as_none=True),
        "general": general_changes(read_json_lines(folder / "validation.jsonl")),
    }
    return stage | {"reached": _reached(record, lines, stage)}


def general_changes(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How the losses on general text and conversations moved, where `replay` had them measured.

    Args:
        lines: of `validation.jsonl`.

    Returns:
        "general chat" and "general text" → mean loss per token `before` and `after`, in nats,
        their `change`, and the `low` and `high` end of its 95% interval; empty before a second
        validation.
    """
    measured = [line["general"] for line in lines if "general" in line]
    found = {}
    for name in measured[0] if len(measured) > 1 else ():
        first, last = measured[0][name], measured[-1][name]
        total = sum(first["tokens"])
        change, error = mean_change(first["losses"], last["losses"], first["tokens"])
        found[name] = {
            "before": sum(first["losses"]) / total,
            "after": sum(last["losses"]) / total,
            "change": change,
            "low": change - Z95 * error,
            "high": change + Z95 * error,
        }
    return found


def forgetting(changes: dict[str, dict[str, float]]) -> str:
    """One line that says what a stage forgot, as far as the noise lets one tell.

    Args:
        changes: as `general_changes` returns them, not empty.
    """
    worse = {name: one for name, one in changes.items() if one["low"] > 0}
    verdict = "it forgot" if worse else "no forgetting seen"
    return f"{verdict}: " + ", ".join(
        f"{name} {one['before']:.3f} → {one['after']:.3f} ({one['change']:+.3f}, "
        f"{one['low']:+.3f} to {one['high']:+.3f})"
        for name, one in (worse or changes).items()
    )


def _reached(
    record: dict[str, Any], lines: list[dict[str, Any]], stage: dict[str, Any]
) -> dict[str, Any]:
    """The figures at a stage's last step: its record's, or else those of the log."""
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
    if len(validation) < 2:  # only the validation before the first step
        figures["eval_loss"] = None
    return figures | {
        "eval_loss_error": validation[-1].get("eval_loss_error") if validation else None,
        "tokens_per_second": median(speeds) if speeds else None,
    }


def speeds_of(stage: dict[str, Any]) -> list[tuple[float, float]]:
    """The throughput between consecutive log lines, without validations and sample answers.

    Returns:
        For each training line: seconds since the stage's first step, and tokens per second since
        the previous training line.
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
    """The sources with a validation loss of their own, logged as `eval_SOURCE_loss`."""
    found = [re.fullmatch("eval_(.+)_loss", key) for line in stage["validation"] for key in line]
    return list(dict.fromkeys(match[1] for match in found if match))


def accuracies(stage: dict[str, Any]) -> dict[str, Any]:
    """Task → its figures in eval.json, for tasks that have an accuracy."""
    tasks = stage["evaluation"]["tasks"] if stage["evaluation"] else {}
    return {name: task for name, task in tasks.items() if "accuracy" in task}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return json.loads(read_small(path), parse_constant=lambda name: None)
