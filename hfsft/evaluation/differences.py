"""How two evaluated models differ, and whether the difference exceeds the noise."""

import json
import math
from pathlib import Path
from typing import Any

from hfsft.evaluation.kept import row_results
from hfsft.noise import Z95, mcnemar, paired_interval, ratio_error

Rows = dict[str, dict[str, Any]]  # a row's digest → its result, as `row_results` returns them


def compare(folders: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """The `difference` of every task that both models were evaluated on.

    Losses on different documents, as two stages hold out, or on a single one are left out: they
    cannot be compared.

    Args:
        folders: each with an eval.json and its eval/.
    """
    tasks = [json.loads((folder / "eval.json").read_text())["tasks"] for folder in folders]
    differences = {
        name: difference(
            tasks[0][name],
            tasks[1][name],
            (row_results(folders[0], name), row_results(folders[1], name)),
        )
        for name in tasks[0]
        if name in tasks[1]
    }
    return {
        name: found
        for name, found in differences.items()
        if "loss" not in tasks[0][name] or (found["paired"] and found["rows"] > 1)
    }


def difference(
    a: dict[str, Any], b: dict[str, Any], rows: tuple[Rows, Rows] | None = None
) -> dict[str, Any]:
    """How much better `b` is than `a` at one task, and whether that exceeds the noise.

    Args:
        a: the task's figures, as in eval.json.
        b: those of the other model.
        rows: the `row_results` of both; rows that both answered are compared pair by pair, which
            detects smaller differences.

    Returns:
        `difference` (of accuracy, or of loss, where less is better), `low` and `high` of its 95%
        interval, `p` (two-sided; None unless paired accuracies), `paired`, `rows` compared, and
        `within_noise`.
    """
    both = sorted(rows[0].keys() & rows[1].keys()) if rows else []
    # if most rows were answered by one model alone, the pairs would tell less than the totals
    paired = 2 * len(both) > max(a["rows"], b["rows"])
    pairs = [(rows[0][row], rows[1][row]) for row in both] if paired else []
    if a["kind"] == "loss":
        found = _paired_losses(pairs) if paired else _separate_losses(a, b)
    else:
        found = _paired_accuracies(pairs) if paired else _separate_accuracies(a, b)
    count = len(pairs) if paired else min(a["rows"], b["rows"])
    order = ("difference", "low", "high", "p")
    return {
        **{key: found[key] for key in order},
        "paired": paired,
        "rows": count,
        "within_noise": found["within_noise"],
    }


def _paired_accuracies(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """McNemar's exact test, with an interval that agrees with it."""
    won = sum(b["right"] and not a["right"] for a, b in pairs)
    lost = sum(a["right"] and not b["right"] for a, b in pairs)
    count = len(pairs)
    value = (won - lost) / count
    low, high = paired_interval(won, lost, count)
    p = mcnemar(won, lost)
    return _interval(value, low, high, within_noise=p >= 0.05, p=p)


def _separate_accuracies(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Newcombe (1998), Interval estimation for the difference between independent proportions."""
    value = b["accuracy"] - a["accuracy"]
    low = value - math.hypot(b["accuracy"] - b["low"], a["high"] - a["accuracy"])
    high = value + math.hypot(b["high"] - b["accuracy"], a["accuracy"] - a["low"])
    return _interval(value, low, high, within_noise=low <= 0 <= high)


def _paired_losses(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """The mean difference per token over the same documents."""
    changes, tokens = [b["loss"] - a["loss"] for a, b in pairs], [a["tokens"] for a, _ in pairs]
    value, half = sum(changes) / sum(tokens), Z95 * ratio_error(changes, tokens)
    return _interval(value, value - half, value + half, within_noise=abs(value) <= half)


def _separate_losses(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The difference of two mean losses per token over different documents."""
    value, errors = b["loss"] - a["loss"], [a["error"], b["error"]]
    half = math.inf if None in errors else Z95 * math.hypot(*errors)
    return _interval(value, value - half, value + half, within_noise=abs(value) <= half)


def _interval(
    value: float, low: float, high: float, within_noise: bool, p: float | None = None
) -> dict[str, Any]:
    return {"difference": value, "low": low, "high": high, "p": p, "within_noise": within_noise}
