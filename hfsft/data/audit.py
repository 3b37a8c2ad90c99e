"""What became of every row: counts, lengths and reasons, as a table and as files."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

NOT_BAD = ("exact duplicate",)  # the reason to refuse a row that is well-formed


PERCENTILES = (5, 50, 95, 100)


def audit_source(
    source: str,
    read: int,
    lengths: Sequence[int],
    trained_tokens: int,
    reasons: Counter,
    truncated: int = 0,
    split: int = 0,
    duplicates: int = 0,
    unit: str = "tokens",
    kept: int | None = None,
    passed_over: Counter | None = None,
) -> dict[str, Any]:
    """Sum up one source.

    Args:
        source: its name.
        read: rows it holds, after sampling.
        lengths: of each document that was kept, or conversation that was prepared.
        trained_tokens: of them, those that carry loss.
        reasons: how many rows were refused for what.
        truncated: conversations that were cut to `max_length`.
        split: rows that became several conversations.
        duplicates: conversations that are exact copies of an earlier one.
        unit: what lengths are counted in: "tokens", or "characters" of base text.
        kept: rows that are conversations, prepared or not; None: as many as `lengths`.
        passed_over: of those how many cannot be trained on for what, as far as they were prepared.

    Returns:
        Plain data; `length_percentiles` maps a percentage to tokens.
    """
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    prepared = {}
    if kept is not None:
        prepared = {
            "passed_over": dict((passed_over or Counter()).most_common()),
            "prepared": len(ordered),
        }
    return {
        "source": source,
        "read": read,
        "kept": len(ordered) if kept is None else kept,
        "refused": dict(reasons.most_common()),
        **prepared,
        "truncated": truncated,
        "split": split,
        "duplicates": duplicates,
        unit: int(ordered.sum()),
        "trained_tokens": trained_tokens,
        "length_percentiles": {
            str(percent): int(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)])
            for percent in PERCENTILES
            if len(ordered)
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


def audit_console() -> Console:
    """A console as wide as the table needs where the output is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def print_audit(stage: str, audit: dict[str, Any], console: Console) -> None:
    """Print the table of a stage's sources; of a stream nothing is known before it is read.

    Of conversations: rows `read` and `kept`, conversations `held` out, an `epoch`'s after copies,
    the run's examples that `use` them, and of those `prepared` tokens, lengths and how many were
    cut or split.
    """
    if not audit["sources"]:
        console.print(f"{stage}: its data streams and is counted as it is read")
        return
    base = "characters" in audit["sources"][0]
    unit = "characters" if base else "tokens"
    columns = {"read": "read", "kept": "kept", "epoch": "train"}
    if not base:
        columns = {"read": "read", "kept": "kept", "held": "held_out", "epoch": "train"}
        columns |= {"used": "used", "prepared": "prepared"}
    table = Table(header_style="bold", box=None, pad_edge=False, collapse_padding=True)
    table.add_column(f"{stage}: data", overflow="fold")
    for column in (*columns, unit, "trained", "median", "max", "cut"):
        table.add_column(column, justify="right", no_wrap=True)
    for source in audit["sources"]:
        trained = source["trained_tokens"] / source[unit] if source[unit] else 0
        lengths = source["length_percentiles"]
        table.add_row(
            source["source"],
            *(f"{source[key]:,}" for key in columns.values()),
            f"{source[unit]:,}",
            "all" if base else f"{trained:.0%}",
            f"{lengths.get('50', 0):,}",
            f"{lengths.get('100', 0):,}",
            f"{source['truncated'] + source['split']:,}",
        )
    console.print(table)
    for source in audit["sources"]:
        for line in _fates(source):
            console.print(f"{source['source']}: {line}", soft_wrap=True)
    prepared = sum(source.get("prepared", 0) for source in audit["sources"])
    if not base and prepared < sum(source["kept"] for source in audit["sources"]):
        console.print(f"tokens, median, max and cut are of the {prepared:,} prepared")
    if "rows" in audit:
        console.print(f"{audit['rows']:,} rows of {audit['tokens_a_row']:,} tokens", end=": ")
    kind = "documents" if base else "conversations"
    held_out = f", {audit['held_out']:,} held out" if audit["held_out"] else ""
    used = ""
    if "examples_per_step" in audit:
        examples, count = audit["examples_per_step"], audit["used"]
        used = f"; this run's {count // examples:,} steps of {examples} use {audit['different']:,}"
        if audit["different"] < count:
            used += f", {count:,} times in all"
    console.print(f"{audit['train']:,} {kind} to train on{held_out}{used}", soft_wrap=True)


def _fates(source: dict[str, Any]) -> Iterator[str]:
    """What leads from a source's rows to its epoch, where that is not plain from the table."""
    for reason, count in source["refused"].items():
        yield f"{count:,} refused: {reason}"
    for reason, count in source.get("passed_over", {}).items():
        yield f"{count:,} passed over: {reason}"
    if source["duplicates"] and "exact duplicate" not in source["refused"]:
        yield f"{source['duplicates']:,} exact copies are kept (duplicates: drop would drop them)"
    if source.get("copies_of_held_out"):
        yield f"{source['copies_of_held_out']:,} left out: exact copies of held-out conversations"
    if source.get("copies", 1) != 1:
        yield f"an epoch sees each {source['copies']:g} times"
