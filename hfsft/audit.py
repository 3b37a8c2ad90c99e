"""What became of every row: counts, lengths and reasons, as a table and as files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# reasons that `on_too_long` and the data's own shape answer for, not a malformed row
NOT_BAD = ("longer than max_length", "nothing left to train on", "exact duplicate")
PERCENTILES = (5, 50, 95, 100)


def audit_source(
    source: str,
    read: int,
    lengths: list[int],
    trained_tokens: int,
    reasons: Counter,
    truncated: int = 0,
    split: int = 0,
    duplicates: int = 0,
    unit: str = "tokens",
) -> dict[str, Any]:
    """Sum up one source.

    Args:
        source: its name.
        read: rows it holds, after sampling.
        lengths: of each conversation or document that was kept.
        trained_tokens: of them, those that carry loss.
        reasons: how many rows were refused for what.
        truncated: conversations that were cut to `max_length`.
        split: rows that became several conversations.
        duplicates: conversations that are exact copies of an earlier one.
        unit: what lengths are counted in: "tokens", or "characters" of base text.

    Returns:
        Plain data; `length_percentiles` maps a percentage to tokens.
    """
    ordered = sorted(lengths)
    return {
        "source": source,
        "read": read,
        "kept": len(ordered),
        "refused": dict(reasons.most_common()),
        "truncated": truncated,
        "split": split,
        "duplicates": duplicates,
        unit: sum(ordered),
        "trained_tokens": trained_tokens,
        "length_percentiles": {
            str(percent): ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
            for percent in PERCENTILES
            if ordered
        },
    }


def bad_rows(audit: dict[str, Any]) -> int:
    """How many of a source's rows are malformed."""
    return sum(count for reason, count in audit["refused"].items() if reason not in NOT_BAD)


def too_many_bad_rows(audit: dict[str, Any]) -> bool:
    """What `on_bad_rows` refuses by default: any of fewer than 100 rows, else above one percent."""
    allowed = audit["read"] / 100 if audit["read"] >= 100 else 0
    return bad_rows(audit) > allowed


def write_audit(folder: Path, audit: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    """Write `data.json` and `rejected.jsonl` into a stage's folder.

    Args:
        folder: the stage's.
        audit: `sources`, and the sizes of the training and the held-out set.
        rejected: each refused row's `source`, `row` (counted from 0) and `reason`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(audit, indent=1) + "\n")
    lines = "".join(json.dumps(entry) + "\n" for entry in rejected)
    (folder / "rejected.jsonl").write_text(lines)


def print_audit(stage: str, audit: dict[str, Any], console: Console) -> None:
    """Print the table of a stage's sources; of a stream nothing is known before it is read."""
    if not audit["sources"]:
        console.print(f"{stage}: its data streams and is counted as it is read")
        return
    unit = "tokens" if "tokens" in audit["sources"][0] else "characters"
    table = Table(header_style="bold", box=None, padding=(0, 1), pad_edge=False)
    table.add_column(f"{stage}: data", no_wrap=True)
    for column in ("read", "kept", "epoch", unit, "trained", "median", "max", "cut"):
        table.add_column(column, justify="right", no_wrap=True)
    for source in audit["sources"]:
        trained = source["trained_tokens"] / source[unit] if source[unit] else 0
        lengths = source["length_percentiles"]
        table.add_row(
            source["source"],
            f"{source['read']:,}",
            f"{source['kept']:,}",
            f"{source['train']:,}",
            f"{source[unit]:,}",
            f"{trained:.0%}" if unit == "tokens" else "all",
            f"{lengths.get('50', 0):,}",
            f"{lengths.get('100', 0):,}",
            f"{source['truncated'] + source['split']:,}",
        )
    console.print(table)
    for source in audit["sources"]:
        for reason, count in source["refused"].items():
            console.print(f"{source['source']}: {count:,} refused: {reason}", soft_wrap=True)
        if source["duplicates"] and "exact duplicate" not in source["refused"]:
            console.print(
                f"{source['source']}: {source['duplicates']:,} exact copies are kept "
                "(duplicates: drop would drop them)",
                soft_wrap=True,
            )
    if "rows" in audit:
        console.print(f"{audit['rows']:,} rows of {audit['tokens_a_row']:,} tokens", end=": ")
    kind = "conversations" if unit == "tokens" else "documents"
    held_out = f", {audit['held_out']:,} held out" if audit["held_out"] else ""
    console.print(f"{audit['train']:,} {kind} to train on{held_out}")
