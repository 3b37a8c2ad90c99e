"""How two models differ, and whether that is noise."""

import json
import math
from pathlib import Path
from typing import Any

from hfsft.evaluation.kept import row_results
from hfsft.noise import Z, mcnemar, ratio_error


def difference(
    a: dict[str, Any],
    b: dict[str, Any],
    rows: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """How much better `b` is than `a` at one task, and whether that is more than noise.

    Args:
        a: the figures of the task, as eval.json has them.
        b: those of another model.
        rows: the `row_results` of both; rows that both were asked are compared one by one
            (McNemar's exact test, 1947), which tells smaller differences apart.

    Returns:
        `difference` (of accuracy; of loss, less is better), `low` and `high` of its 95% interval,
        `p` (two-sided; None for losses), `paired`, `rows` that were compared, and `within_noise`.
    """
    both = sorted(rows[0].keys() & rows[1].keys()) if rows else []
    # most rows were asked of one of them alone: the pairs would say less
    paired = 2 * len(both) > max(a["rows"], b["rows"])
    if a["kind"] == "loss":
        return _loss_difference(a, b, [(rows[0][k], rows[1][k]) for k in both] if paired else None)
    if paired:
        lost = sum(rows[0][k]["right"] and not rows[1][k]["right"] for k in both)
        won = sum(rows[1][k]["right"] and not rows[0][k]["right"] for k in both)
        count = len(both)
        value = (won - lost) / count
        half = Z * math.sqrt(max(won + lost - (won - lost) ** 2 / count, 0)) / count
        p = mcnemar(won, lost)
        low, high, noise = value - half, value + half, p >= 0.05
    else:
        count = min(a["rows"], b["rows"])
        value = b["accuracy"] - a["accuracy"]
        # Newcombe 1998, Interval estimation for the difference between independent proportions
        low = value - math.hypot(b["accuracy"] - b["low"], a["high"] - a["accuracy"])
        high = value + math.hypot(b["high"] - b["accuracy"], a["accuracy"] - a["low"])
        p, noise = None, low <= 0 <= high
    return {
        "difference": value,
        "low": low,
        "high": high,
        "p": p,
        "paired": paired,
        "rows": count,
        "within_noise": noise,
    }


def _loss_difference(
    a: dict[str, Any], b: dict[str, Any], pairs: list[tuple[dict[str, Any], dict[str, Any]]] | None
) -> dict[str, Any]:
    if pairs:
        tokens = sum(x["tokens"] for x, _ in pairs)
        value = sum(y["loss"] - x["loss"] for x, y in pairs) / tokens
        error = ratio_error([y["loss"] - x["loss"] - value * x["tokens"] for x, y in pairs], tokens)
        count = len(pairs)
    else:
        value, count = b["loss"] - a["loss"], min(a["rows"], b["rows"])
        errors = [a["error"], b["error"]]
        error = None if None in errors else math.hypot(*errors)
    half = math.inf if error is None else Z * error
    return {
        "difference": value,
        "low": value - half,
        "high": value + half,
        "p": None,
        "paired": bool(pairs),
        "rows": count,
        "within_noise": abs(value) <= half,
    }


def compare(folders: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """The `difference` of each task that two models were asked, row by row where they can be.

    Args:
        folders: each with an eval.json and its eval/.
    """
    tasks = [json.loads((folder / "eval.json").read_text())["tasks"] for folder in folders]
    found = {
        name: difference(
            tasks[0][name],
            tasks[1][name],
            (row_results(folders[0], name), row_results(folders[1], name)),
        )
        for name in tasks[0]
        if name in tasks[1]
    }
    # losses on other documents, as two stages hold out, or on one alone, say nothing of each other
    return {
        name: one
        for name, one in found.items()
        if "loss" not in tasks[0][name] or (one["paired"] and one["rows"] > 1)
    }
