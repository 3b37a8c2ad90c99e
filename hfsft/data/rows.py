"""Every row of a source, read as messages and checked; nothing is tokenized yet."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from hfsft.data.cache import cached_map
from hfsft.data.sources import JSON_COLUMN, ROW_COLUMN, columns_of, load_rows, parse_row
from hfsft.errors import DataError
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.messages import content_digest
from hfsft.tokens.row_formats import BadRow, detect_format, read_row

Row = tuple[int, int]  # the position of a source in the stage's data, and of a row in the source

LOOKED_AT = 1000  # rows of JSON, for a column that not every row has

CHECKED = {
    "digest": datasets.Value("string"),
    "refused": datasets.Value("string"),
    "unused": datasets.List(datasets.Value("string")),
}


@dataclass
class SourceRows:
    """A source's rows, each read and checked."""

    source: Source
    rows: datasets.Dataset
    row_format: str
    indices: list[int]  # of the rows in the source, before sampling
    digests: list[str]  # of their content
    refused: dict[int, str]  # position → why it is not a conversation
    unused: Counter[str] = field(default_factory=Counter)  # columns and fields that nothing reads
    duplicates: int = 0
    excluded: dict[int, str] = field(default_factory=dict)  # position → why it is not trained on

    @property
    def kept(self) -> list[int]:
        """The positions of the rows that are conversations."""
        return [row for row in range(len(self.indices)) if row not in self.refused]

    def rejected(self) -> list[dict[str, Any]]:
        """An entry for each row that is not trained on, in the order of the rows."""
        return [
            {"source": str(self.source), "row": self.indices[row], "reason": reason}
            for row, reason in sorted((self.refused | self.excluded).items())
        ]


def check_source(source: Source, stage: Stage) -> SourceRows:
    """Read every row of a source as messages.

    Args:
        source: one of the stage's.
        stage: gives the seed and the number of processes.

    Raises:
        DataError: if the source cannot be read, or its format is unknown.
    """
    rows = load_rows(source, stage.seed)
    require_columns(rows, source)
    row_format = source.format or detect_format(columns_of(rows, source), str(source))

    def check(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in CHECKED}
        renamed = {f"column {old}" for old in source.columns.values()}
        for row in rows_of_batch(batch):
            try:
                conversation = read_row(parse_row(row, source), row_format)
                digest, reason = content_digest(conversation), ""
                unused = [name for name in conversation.unused if name not in renamed]
            except BadRow as bad:
                digest, reason, unused = "", str(bad), []
            out["digest"].append(digest)
            out["refused"].append(reason)
            out["unused"].append(unused)
        return out

    key = ("checked", rows._fingerprint, row_format, source.columns)
    try:
        checked = cached_map(rows, check, CHECKED, repr(key), stage, f"{source}: read")
    except UnicodeDecodeError:  # Arrow does not check a text's encoding before it is read
        raise DataError(f"{source}: has text that is not UTF-8") from None
    refused = {row: reason for row, reason in enumerate(checked["refused"][:]) if reason}
    indices, digests = rows[ROW_COLUMN][:], checked["digest"][:]
    unused = Counter(name for names in checked["unused"][:] for name in names)
    return SourceRows(source, rows, row_format, indices, digests, refused, unused)


def require_columns(rows: datasets.Dataset, source: Source) -> None:
    """Check that a source has every column that it renames.

    Without it a column that has the format's own name would be read instead. Rows of JSON each have
    their own columns: the first `LOOKED_AT` count.

    Raises:
        DataError: naming the first that it lacks.
    """
    if not source.columns:
        return
    found = dict.fromkeys(
        name for name in rows.column_names if name not in (JSON_COLUMN, ROW_COLUMN)
    )
    if JSON_COLUMN in rows.column_names:
        for row in rows.select(range(min(LOOKED_AT, len(rows)))):
            with suppress(BadRow):
                found |= dict.fromkeys(parse_row(row, replace(source, columns={})))
            if found.keys() >= set(source.columns.values()):
                return
    for old in source.columns.values():
        if found and old not in found:
            raise DataError(f"{source}: columns: has no column '{old}', only {', '.join(found)}")


def rows_of_batch(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch that `datasets.map` gives as columns."""
    names = [name for name in batch if name != ROW_COLUMN]
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def count_duplicates(sources: list[SourceRows], stage: Stage) -> None:
    """Count exact copies of earlier rows, and refuse them if the stage drops duplicates."""
    seen: set[str] = set()
    for source in sources:
        for row in source.kept:
            if source.digests[row] in seen:
                source.duplicates += 1
                if stage.duplicates == "drop":
                    source.refused[row] = "exact duplicate"
            seen.add(source.digests[row])
