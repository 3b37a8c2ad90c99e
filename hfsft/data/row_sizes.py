"""How long the rows of a file are, found out in bounded memory before a reader holds them.

pandas, `datasets` and Arrow hold whole rows, documents and row groups: a file of kilobytes can
unpack to gigabytes of them. What is read here is measured block by block.
"""

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets.utils.extract import Extractor

from hfsft.data.json_rows import BLOCK, RowTooLong, bounded_lines

HELD = 1 << 28  # bytes of rows that a reader may hold at a time
MOST_COLUMNS = 10_000

# a file that unpacks to more than both is no data: text is packed 3 to 50 times
UNPACKED = 1 << 30  # bytes
TIMES_PACKED = 200


class UnpacksTooFar(ValueError):
    """A file that unpacks to far more bytes than any data does."""


# --- files that may be compressed ---


class _Unpacked(io.RawIOBase):
    """A file while it is decompressed; fails where it has become too much."""

    def __init__(self, opened: BinaryIO, packed: int):
        self.opened, self.packed, self.given = opened, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.opened.read(len(buffer))
        buffer[: len(block)] = block
        self.given += len(block)
        _require_sensible(self.given, self.packed)
        return len(block)


def _require_sensible(unpacked: int, packed: int) -> None:
    if unpacked > max(UNPACKED, TIMES_PACKED * packed):
        raise UnpacksTooFar(
            f"unpacks to more than {TIMES_PACKED} times its {packed:,} bytes, which no data does"
        )


@contextmanager
def unpacked(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read, decompressed if its name ends in .gz or .zst.

    Raises:
        UnpacksTooFar: while it is read, beyond `UNPACKED` bytes and `TIMES_PACKED` its size.
    """
    with fsspec.open(str(file), "rb", compression="infer") as opened:
        yield io.BufferedReader(_Unpacked(opened, os.path.getsize(file)), BLOCK)


def require_packed_as_named(file: Path) -> None:
    """Check that what `datasets` would unpack by a file's content is what its name says.

    It also unpacks a .txt that is a zip or a tar, whose sparse members may have any size.

    Raises:
        ValueError: if it is packed in another way.
    """
    packed = Extractor.infer_extractor_format(file)
    if packed != {".gz": "gzip", ".zst": "zstd"}.get(file.suffix):
        raise ValueError(f"is {f'packed as {packed}' if packed else 'not packed'}, unlike its name")


# --- text and CSV ---


def require_short_text(file: Path, longest: int, by_line: bool) -> None:
    """Check a text file, of which a row is the whole or a line.

    Args:
        file: may be compressed.
        longest: bytes of a row.
        by_line: whether a row is a line.

    Raises:
        RowTooLong, UnpacksTooFar: if one is longer.
    """
    with unpacked(file) as opened:
        if by_line:
            for number, line in bounded_lines(opened, longest):
                if line is None:
                    raise RowTooLong(f"line {number} is longer than {longest:,} bytes")
            return
        length = 0
        while block := opened.read(BLOCK):
            length += len(block)
            if length > longest:
                raise RowTooLong(f"is one document of more than {longest:,} bytes")


def longest_csv_row(file: Path, longest: int, separator: str = ",") -> int:
    """The length of the longest row of a CSV file, with the line breaks in its cells.

    Args:
        file: may be compressed.
        longest: characters of a row.
        separator: between cells.

    Raises:
        RowTooLong, UnpacksTooFar: if one is longer, or has more than `MOST_COLUMNS` cells.
        ValueError: if it is not UTF-8 text.
    """
    most = held = 0
    with unpacked(file) as opened:
        text = io.TextIOWrapper(opened, "utf-8-sig", newline="")

        def lines() -> Iterator[str]:
            nonlocal held
            while line := text.readline(longest + 1):
                held += len(line)
                if held > longest:
                    raise RowTooLong(f"row {rows} is longer than {longest:,} characters")
                yield line

        before, rows = csv.field_size_limit(longest + 1), 0
        try:
            for cells in csv.reader(lines(), delimiter=separator):
                if len(cells) > MOST_COLUMNS:
                    raise RowTooLong(f"row {rows} has more than {MOST_COLUMNS:,} cells")
                most, held, rows = max(most, held), 0, rows + 1
        except csv.Error:  # what is no CSV is for the reader to say
            return longest
        finally:
            csv.field_size_limit(before)
    return most


# --- Parquet ---


def parquet_batch(file: Path, longest: int) -> int:
    """How many rows of a Parquet file may be read at a time, so that they take `HELD` bytes.

    Texts are read as a dictionary of the different ones: as plain values, a thousand copies of a
    megabyte take a gigabyte.

    Args:
        file: the file.
        longest: bytes of a row.

    Raises:
        RowTooLong, UnpacksTooFar: if a row is longer, or it unpacks to far too much.
        pyarrow.ArrowException, OSError: if it cannot be read.
    """
    size = os.path.getsize(file)
    with pa.parquet.ParquetFile(file) as opened:
        metadata = opened.metadata
        columns = [opened.schema.column(index) for index in range(len(opened.schema))]
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            # what is decompressed together may be all of it
            if chunk.total_uncompressed_size > max(
                4 * longest, TIMES_PACKED * chunk.total_compressed_size
            ):
                raise UnpacksTooFar(
                    f"a column of {chunk.total_compressed_size:,} bytes unpacks to "
                    f"{chunk.total_uncompressed_size:,}, which no data does"
                )
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    rows, total, most, fullest = 0, 0, 0, 0
    with pa.parquet.ParquetFile(file, read_dictionary=texts) as opened:
        for batch in opened.iter_batches(batch_size=1024, use_threads=False):
            sizes = np.zeros(len(batch), np.int64)
            for column in batch.columns:
                sizes += _sizes(column)
            if len(sizes) and sizes.max() > longest:
                row = rows + int(sizes.argmax())
                raise RowTooLong(f"row {row} is longer than {longest:,} bytes")
            rows, total = rows + len(batch), total + int(sizes.sum())
            most, fullest = max(most, int(sizes.max(initial=0))), max(fullest, int(sizes.sum()))
            _require_sensible(total, size)
    return 1024 if fullest <= HELD else max(1, HELD // most)


def _sizes(values: pa.Array) -> np.ndarray:
    """The bytes that each value of an Arrow array takes in Arrow's plain form; int64 [values]."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = _sizes(values.dictionary)
        indices = np.asarray(values.indices.fill_null(0))
        return lengths[indices] if len(lengths) else np.zeros(len(values), np.int64)
    if pa.types.is_struct(kind):
        return sum(map(_sizes, values.flatten()), np.zeros(len(values), np.int64))
    if pa.types.is_fixed_size_list(kind):
        values = values.cast(pa.list_(kind.value_type))
        kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        inside = values.values if not pa.types.is_map(kind) else _map_entries(values)
        ends = np.concatenate([[0], np.cumsum(_sizes(inside))])
        offsets = np.asarray(values.offsets)
        return ends[offsets[1:]] - ends[offsets[:-1]] + 8
    if pa.types.is_fixed_size_binary(kind):
        return np.full(len(values), kind.byte_width)
    if kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        return np.asarray(pa.compute.binary_length(values).fill_null(0)).astype(np.int64) + 8
    return np.full(len(values), 8, np.int64)


def _map_entries(values: pa.MapArray) -> pa.StructArray:
    return pa.StructArray.from_arrays([values.keys, values.items], ["key", "value"])
