"""Every row of a source read as messages and checked."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets

from hfsft.data.cache import mapped
from hfsft.data.sources import ROW_COLUMN, columns_of, load_rows, renamed
from hfsft.errors import DataError
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.formats import BadRow, content_digest, detect_format, to_messages


@dataclass
class CheckedSource:
    """A source's rows, each read and checked."""

    source: Source
    rows: datasets.Dataset
    row_format: str
    numbers: list[int]  # of the rows in the source
    digests: list[str]  # of their content
    refused: dict[int, str]  # position → why it is no conversation
    duplicates: int = 0
    passed_over: dict[int, str] = field(default_factory=dict)  # why it cannot be trained on

    @property
    def kept(self) -> list[int]:
        """The positions of the rows that are conversations."""
        return [row for row in range(len(self.numbers)) if row not in self.refused]

    def rejected(self) -> list[dict[str, Any]]:
        """An entry for each row that is not trained on, in the order of the rows."""
        return [
            {"source": str(self.source), "row": self.numbers[row], "reason": reason}
            for row, reason in sorted((self.refused | self.passed_over).items())
        ]


def check_source(source: Source, stage: Stage) -> CheckedSource:
    """Read every row of a source as messages; no text is encoded."""
    rows = load_rows(source, stage.seed)
    row_format = source.format or detect_format(columns_of(rows, source), str(source))

    def check(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"digest": [], "refused": []}
        for row in rows_of_batch(batch):
            try:
                digest, reason = content_digest(to_messages(renamed(row, source), row_format)), ""
            except BadRow as bad:
                digest, reason = "", str(bad)
            out["digest"].append(digest)
            out["refused"].append(reason)
        return out

    key = ("checked", rows._fingerprint, row_format, source.columns)
    try:
        checked = mapped(rows, check, CHECKED, repr(key), stage, f"{source}: read")
    except UnicodeDecodeError:  # Arrow looks into no text before it is read
        raise DataError(f"{source}: holds text that is not UTF-8") from None
    refused = {row: reason for row, reason in enumerate(checked["refused"][:]) if reason}
    numbers, digests = rows[ROW_COLUMN][:], checked["digest"][:]
    return CheckedSource(source, rows, row_format, numbers, digests, refused)


def rows_of_batch(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch that `datasets.map` gives as columns."""
    names = [name for name in batch if name != ROW_COLUMN]
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def refuse_duplicates(sources: list[CheckedSource], stage: Stage) -> None:
    """Count exact copies of an earlier row, and refuse them if the stage drops them."""
    seen: set[str] = set()
    for source in sources:
        for row in source.kept:
            if source.digests[row] in seen:
                source.duplicates += 1
                if stage.duplicates == "drop":
                    source.refused[row] = "exact duplicate"
            seen.add(source.digests[row])


Row = tuple[int, int]  # the position of a source in the stage's data, of a row in the source


CHECKED = {"digest": datasets.Value("string"), "refused": datasets.Value("string")}
