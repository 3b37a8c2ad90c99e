"""What became of every row: counts, lengths and reasons, as a table and as files."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hfsft.errors import printable
from hfsft.run.files import write_text_atomically
from hfsft.terminal import Terminal
from hfsft.tokens.training_flags import AVOIDED, NOT_TRAINED

# how the reasons to leave out a well-formed row begin
NOT_BAD = ("exact duplicate", AVOIDED, NOT_TRAINED)

PERCENTILES = (5, 50, 95, 100)  # of the lengths


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
    excluded: Counter | None = None,
    unused: Counter | None = None,
    left_out: Counter | None = None,
) -> dict[str, Any]:
    """Summarize what became of a source's rows.

    Args:
        source: its name.
        read: rows it has, after sampling.
        lengths: of each document kept, or each conversation encoded.
        trained_tokens: of these, the tokens that carry loss.
        reasons: why rows were refused, with counts.
        truncated: conversations truncated to `max_length`.
        split: rows that became several conversations.
        duplicates: rows that are exact copies of an earlier one.
        unit: of the lengths: "tokens", or "characters" of base text.
        kept: rows that are conversations, encoded or not; None: as many as `lengths`.
        excluded: why conversations cannot be trained on, with counts, of those encoded.
        unused: columns and fields that rows have and nothing reads, with counts.
        left_out: what the chat template does not write of conversations, with counts.

    Returns:
        Plain data; `length_percentiles` maps a percentage to a length.
    """
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    prepared = {}
    if kept is not None:
        prepared = {
            "passed_over": dict((excluded or Counter()).most_common()),
            "unused": dict((unused or Counter()).most_common()),
            "left_out": dict((left_out or Counter()).most_common()),
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


def is_bad(reason: str) -> bool:
    """Whether a row refused for this reason is malformed, rather than left out on purpose."""
    return not reason.startswith(NOT_BAD)


def bad_rows(audit: dict[str, Any]) -> int:
    """How many of a source's rows are malformed.

    Args:
        audit: as `audit_source` returns it.
    """
    return sum(count for reason, count in audit["refused"].items() if is_bad(reason))


def too_many_bad_rows(audit: dict[str, Any]) -> bool:
    """The default of `on_bad_rows`: refuse any bad row of fewer than 100, else above one percent.

    Args:
        audit: as `audit_source` returns it.
    """
    allowed = audit["read"] / 100 if audit["read"] >= 100 else 0
    return bad_rows(audit) > allowed


def write_audit(folder: Path, audit: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    """Write `data.json` and `rejected.jsonl` into a stage's folder.

    Args:
        folder: the stage's.
        audit: `sources`, and the sizes of the training and held-out sets.
        rejected: each refused row's `source`, `row` (from 0) and `reason`.
    """
    write_text_atomically(folder / "data.json", json.dumps(audit, indent=1) + "\n")
    lines = "".join(json.dumps(entry) + "\n" for entry in rejected)
    write_text_atomically(folder / "rejected.jsonl", lines)


def audit_console() -> Terminal:
    """A console, 100 columns wide if the output is not a terminal; what it prints is no markup."""
    return Terminal(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)


def print_audit(stage: str, audit: dict[str, Any], console: Terminal) -> None:
    """Print the table of a stage's sources, why rows are missing, and the sizes of the sets.

    Args:
        stage: its name.
        audit: as `write_audit` takes it; a stream has no sources yet.
        console: prints it.
    """
    if not audit["sources"]:
        console.print(f"{stage}: its data streams and is counted while it is read")
        return
    is_text = "characters" in audit["sources"][0]
    console.print(_table(stage, audit["sources"], is_text))
    for source in audit["sources"]:
        for line in what_is_missing(source):
            console.print(f"{source['source']}: {line}", soft_wrap=True)
    prepared = sum(source.get("prepared", 0) for source in audit["sources"])
    if not is_text and prepared < sum(source["kept"] for source in audit["sources"]):
        console.print(f"tokens, median, max and long cover the {prepared:,} prepared")
    console.print(_sizes(audit, is_text), soft_wrap=True)


def _table(stage: str, sources: list[dict[str, Any]], is_text: bool) -> Table:
    """The counts of each source, in the order that rows go through them.

    Of conversations: rows `read` and `kept`; conversations `held` out, in an `epoch` after copies,
    `used` as the run's examples, and `prepared`. Tokens and lengths are those of the prepared ones;
    `long` are those of them above `max_length`, truncated or split.
    """
    unit = "characters" if is_text else "tokens"
    columns = {"read": "read", "kept": "kept", "epoch": "train"}
    if not is_text:
        columns = {"read": "read", "kept": "kept", "held": "held_out", "epoch": "train"}
        columns |= {"used": "used", "prepared": "prepared"}
    table = Table(header_style="bold", box=None, pad_edge=False, collapse_padding=True)
    table.add_column(f"{stage}: data", overflow="fold")
    for column in (*columns, unit, "trained", "median", "max", "long"):
        table.add_column(column, justify="right", no_wrap=True)
    for source in sources:
        trained = source["trained_tokens"] / source[unit] if source[unit] else 0
        lengths = source["length_percentiles"]
        table.add_row(
            source["source"],
            *(f"{source[key]:,}" for key in columns.values()),
            f"{source[unit]:,}",
            "all" if is_text else f"{trained:.0%}",
            f"{lengths.get('50', 0):,}",
            f"{lengths.get('100', 0):,}",
            f"{source['truncated'] + source['split']:,}",
        )
    return table


def what_is_missing(source: dict[str, Any]) -> Iterator[str]:
    """Why a source's epoch does not have exactly its rows, and what of them nothing reads.

    Args:
        source: as `audit_source` returns it.
    """
    for reason, count in source["refused"].items():
        yield f"{count:,} refused: {reason}"
    for reason, count in source.get("passed_over", {}).items():
        yield f"{count:,} excluded: {reason}"
    for name, count in source.get("left_out", {}).items():
        yield f"{count:,} without their {name}, which the chat template leaves out"
    if names := source.get("unused"):
        told = ", ".join(f"{printable(name)} ({count:,})" for name, count in names.items())
        yield f"not used: {told}"
    if source["duplicates"] and "exact duplicate" not in source["refused"]:
        yield f"{source['duplicates']:,} exact copies kept (to drop them: duplicates: drop)"
    if source.get("copies_of_held_out"):
        yield f"{source['copies_of_held_out']:,} excluded: exact copies of held-out conversations"
    if source.get("copies", 1) != 1:
        yield f"each seen {source['copies']:g} times per epoch"


def _sizes(audit: dict[str, Any], is_text: bool) -> str:
    """The sizes of the sets, and of sft how much of them the run uses."""
    rows = (
        f"{audit['rows']:,} rows of {audit['tokens_a_row']:,} tokens: " if "rows" in audit else ""
    )
    kind = "documents" if is_text else "conversations"
    held_out = f", {audit['held_out']:,} held out" if audit["held_out"] else ""
    used = ""
    if "examples_per_step" in audit:
        examples, count = audit["examples_per_step"], audit["used"]
        used = f"; this run's {count // examples:,} steps of {examples} use {audit['different']:,}"
        if audit["different"] < count:
            used += f", {count:,} times in total"
    return f"{rows}{audit['train']:,} {kind} to train on{held_out}{used}"
