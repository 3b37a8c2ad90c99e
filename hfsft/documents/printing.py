"""What became of the documents, as lines in the terminal."""

from collections import Counter
from typing import Any

from hfsft.documents.making import Output
from hfsft.terminal import say


def print_counts(counts: dict[str, Any], output: Output) -> None:
    """Print what was read, what was asked for, and what is in the file.

    Args:
        counts: as `make_text` or `make_conversations` returns them.
        output: the files.
    """
    for line in count_lines(counts):
        say(line)
    if counts.get("no_answer"):
        say("the same command asks again for the rows without an answer")
    if counts.get("refused"):
        say(f"refused rows, with what the teacher wrote: {output.refused}")
    say(f"written: {output.path}")


def count_lines(counts: dict[str, Any]) -> list[str]:
    """The counts, one kind a line.

    Args:
        counts: as `make_text` or `make_conversations` returns them.
    """
    lines = [f"{counts['documents']:,} documents in {counts['passages']:,} passages"]
    unread = Counter(one["reason"] for one in counts["unread"])
    example = {one["reason"]: one["file"] for one in reversed(counts["unread"])}
    for reason, count in unread.most_common():
        lines.append(f"  {count:,} not read: {reason}, such as {example[reason]}")
    if counts["duplicates"]:
        lines.append(f"  {counts['duplicates']:,} passages left out: the same as an earlier one")
    if "asked" not in counts:
        return [*lines, f"{counts['rows']:,} rows of text"]
    if counts["too_short"]:
        lines.append(f"  {counts['too_short']:,} passages left out: too short to ask about")
    lines.append(f"{counts['asked']:,} rows asked for, {counts['rows']:,} kept")
    for reason, count in counts["refused"].items():
        lines.append(f"  {count:,} refused: {reason}")
    for reason, count in counts["no_answer"].items():
        lines.append(f"  {count:,} without an answer: {reason}")
    return lines
