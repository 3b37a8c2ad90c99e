"""The rows of one source: a built-in task or text, local files, a folder, or the Hub.

`load_rows` is the entry point. What it returns has one of two shapes: the dataset's own columns
(Parquet, CSV, the Hub), or each row as JSON text under `JSON_COLUMN` (JSON files, tasks), since
the rows of a JSON file need not share a schema. `parse_row` makes a plain mapping of either.
"""

import glob
import json
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pandas
import zstandard

from hfsft.data.cache import cached_rows, files_digest
from hfsft.data.json_rows import RowTooLong, bounded_lines, list_items
from hfsft.data.row_sizes import (
    HELD,
    UnpacksTooFar,
    longest_csv_row,
    parquet_batch,
    require_packed_as_named,
    require_short_text,
    unpacked,
)
from hfsft.data.tasks import TASKS, TEXTS, task_rows, text_rows
from hfsft.errors import DataError, first_line, nearest
from hfsft.hub.client import require_on_hub
from hfsft.recipe.schema import Source
from hfsft.tokens.row_formats import BadRow, known_format

JSON_COLUMN = "hfsft_json"  # a row as its JSON text
ROW_COLUMN = "hfsft_row"  # a row's index in its source, from 0
SOURCE_COLUMN = "source"  # the name of the source that a held-out row comes from

# begins what stands for a row that is refused unread; no JSON begins so
REFUSED = "\0"

# spaces in a row that a tokenizer still takes: at 10 million its regular expressions give up
LONGEST_GAP = 500_000

READERS = {".parquet": "parquet", ".csv": "csv", ".txt": "text"}
JSON = (".jsonl", ".json")

BROKEN_FILE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
# what datasets raises for a folder or a dataset that it cannot load
NOT_LOADED = (
    *(*BROKEN_FILE, ValueError, KeyError, RuntimeError, AttributeError, TypeError),
    datasets.exceptions.DatasetsError,
)


def load_rows(source: Source, seed: int) -> datasets.Dataset:
    """Load a source's rows, sampled if it asks for fewer, each with its index under `ROW_COLUMN`.

    Args:
        source: a recipe's.
        seed: of the sample and of generated rows, unless the source has its own.

    Raises:
        DataError: if the source is missing, unreadable or empty.
    """
    seed = seed if source.seed is None else source.seed
    if source.path in TASKS:
        try:
            made = task_rows(source.path, rows=source.rows, split=source.split, seed=seed)
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
        return _json_rows([json.dumps(row) for row in made])
    if source.path == "reasoning_gym":
        return _json_rows(_reasoning_gym(source, seed))
    rows = _stored_rows(source)
    if len(rows) == 0:
        raise DataError(f"{source}: has no rows")
    if ROW_COLUMN not in rows.column_names:
        rows = rows.add_column(ROW_COLUMN, np.arange(len(rows)))
    if source.rows is not None and source.rows < len(rows):
        if source.first:
            return rows.select(range(source.rows))
        kept = random.Random(f"{seed}:{source.seed_name}").sample(range(len(rows)), source.rows)
        return rows.select(kept)
    return rows


def _stored_rows(source: Source) -> datasets.Dataset:
    """All rows of a source that is stored somewhere, rather than generated."""
    if source.path in TEXTS:
        return datasets.Dataset.from_list(text_rows(source.path))
    if files := _local_files(source):
        return _read_files(files, source)
    if os.path.isdir(os.path.expanduser(source.path)):
        return _read_folder(source)
    return _plain_columns(read_hub(source, streaming=False))


# --- generated rows ---


def _json_rows(lines: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({JSON_COLUMN: lines, ROW_COLUMN: list(range(len(lines)))})


def _reasoning_gym(source: Source, seed: int) -> list[str]:
    """Rows of one of reasoning-gym's seeded generators, 500 by default."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"{source}: needs a package: pip install 'hfsft[tasks]'") from None
    if source.name not in DATASETS:
        hint = nearest(source.name or "", DATASETS) or ", such as chain_sum"
        raise DataError(f"{source}: name is none of its {len(DATASETS)} generators{hint}")
    made = reasoning_gym.create_dataset(source.name, size=source.rows or 500, seed=seed)
    return [
        json.dumps({"prompt": item["question"], "completion": str(item["answer"])}) for item in made
    ]


# --- files ---


def _local_files(source: Source) -> list[Path]:
    path = os.path.expanduser(source.path)
    if os.path.isfile(path):  # pathlib's raises where a name is too long
        return [Path(path)]
    if glob.has_magic(path):
        files: dict[str, Path] = {}  # real path → the path found: `**` follows links
        for found in sorted(glob.glob(path, recursive=True)):
            files.setdefault(os.path.realpath(found), Path(found))
        for file in files.values():
            if not os.path.isfile(file):
                raise DataError(f"{source}: {file.name} is not a file")
        if not files:
            raise DataError(f"{source}: no file matches")
        return list(files.values())
    if not os.path.isdir(path) and (
        path.startswith((".", "/"))
        or Path(path.removesuffix(".gz").removesuffix(".zst")).suffix in (*READERS, *JSON)
    ):
        raise DataError(f"{source}: no such file")
    return []


def _read_files(files: list[Path], source: Source) -> datasets.Dataset:
    suffixes = {_suffix(file) for file in files}
    if len(suffixes) > 1:
        raise DataError(f"{source}: matches files of several kinds: {', '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    if suffix not in (*JSON, *READERS):
        raise DataError(
            f"{source}: unknown kind of file {suffix!r}; known are .jsonl, .json, .csv and .txt, "
            "each also .gz or .zst, and .parquet"
        )
    _refuse_split(source)
    if suffix in JSON:
        return _read_json(files, [suffix] * len(files), source)
    try:
        options = {"sample_by": "document"} if suffix == ".txt" else {}
        options |= _bounded(files, READERS[suffix], source, by_line=False)
        if suffix == ".csv":
            options |= _csv_options(files, source)
        rows = datasets.load_dataset(
            READERS[suffix], data_files=[str(file) for file in files], split="train", **options
        )
    except (*BROKEN_FILE, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise _unreadable(source, error) from None
    return _plain_columns(rows)


def _bounded(
    files: list[Path], reader: str, source: Source, by_line: bool, separator: str = ","
) -> dict[str, Any]:
    """Options for `datasets` to read files in bounded memory; it holds whole rows, and many.

    Args:
        files: what it reads.
        reader: its name for the kind of file.
        source: says how long a row may be.
        by_line: whether a row of text is a line, or the file.
        separator: between the cells of a CSV.

    Raises:
        DataError: if a row is longer, or a file unpacks to far too much.
    """
    most = source.max_row_bytes
    rows_at_once = []
    for file in files:
        try:
            if reader != "parquet":
                require_packed_as_named(file)
            if reader == "parquet":
                rows_at_once.append(parquet_batch(file, most))
            elif reader == "csv":
                longest = longest_csv_row(file, most, separator)
                rows_at_once.append(min(10_000, max(1, HELD // max(1, longest))))
            elif reader == "text":
                require_short_text(file, most, by_line)
        except (RowTooLong, UnpacksTooFar) as error:
            raise _too_much(_named(source, file), error) from None
    name = {"parquet": "batch_size", "csv": "chunksize"}.get(reader)
    return {name: min(rows_at_once)} if name else {}


def _named(source: Source, file: Path) -> str:
    """A source, with the file in it."""
    return str(source) if str(source) == str(file) else f"{source}: {file.name}"


def _too_much(name: str, error: ValueError) -> DataError:
    """A file's row that is too long, or a file that unpacks to too much, with the way out."""
    if isinstance(error, UnpacksTooFar):
        return DataError(f"{name}: {error}\n  If it is meant: decompress it and name that file")
    return DataError(f"{name}: {error}\n  If it is a row: raise max_row_bytes")


def _unreadable(source: Source, error: Exception) -> DataError:
    """What `datasets` raised, as a `DataError`."""
    cause = error.__cause__ or error
    # the second condition: the columns' types differ
    if isinstance(cause, datasets.table.CastError) or "Couldn't cast array" in str(cause):
        return DataError(f"{source}: its files differ in their columns")
    if "corresponds to no data" in str(cause):  # a CSV of a header alone
        return DataError(f"{source}: has no rows")
    return DataError(f"{source}: cannot be read: {first_line(cause)}")


def _csv_options(files: list[Path], source: Source, **settings: Any) -> dict[str, Any]:
    """Options for `datasets` to read every cell as text, rather than as `True`, `4` or `null`."""
    headers = []
    for file in files:
        start = pandas.read_csv(file, **settings | {"nrows": 1, "chunksize": None, "dtype": str})
        # else pandas took the first field of a row for its label
        if not isinstance(start.index, pandas.RangeIndex):
            raise DataError(f"{source}: cannot be read: a row has more fields than the header")
        headers.append(list(start.columns))
    if any(header != headers[0] for header in headers):
        raise DataError(f"{source}: its files differ in their columns")
    features = datasets.Features(dict.fromkeys(headers[0], datasets.Value("string")))
    return {"keep_default_na": False, "features": features}


def _read_json(files: list[Path], suffixes: list[str], source: Source) -> datasets.Dataset:
    """Rows of JSON files as `JSON_COLUMN`, cached.

    Args:
        files: in order.
        suffixes: how to read each: `.json` is a list of rows, `.jsonl` has one row per line.
        source: for errors.
    """
    try:
        key = [
            (suffix, os.path.getsize(file)) for file, suffix in zip(files, suffixes, strict=True)
        ]
        key = repr((key, files_digest(files), source.max_row_bytes))
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {first_line(error)}") from None
    lines = (
        line
        for file, suffix in zip(files, suffixes, strict=True)
        for line in _json_lines(file, suffix, source)
    )
    return cached_rows(
        f"json:{key}",
        lambda: ({JSON_COLUMN: line, ROW_COLUMN: n} for n, line in enumerate(lines)),
        {JSON_COLUMN: datasets.Value("large_string"), ROW_COLUMN: datasets.Value("int64")},
    )


def _suffix(file: Path) -> str:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    return file.suffix if name.endswith(".parquet") else Path(name).suffix


def _refuse_split(source: Source) -> None:
    if source.split != "train":
        raise DataError(f"{source}: split: {source.split}: a file has no splits")


def _json_lines(file: Path, suffix: str, source: Source) -> Iterator[str]:
    """Each row's JSON text: a line of a .jsonl, or an item of the list in a .json."""
    name, number, longest = _named(source, file), 0, source.max_row_bytes
    try:
        with unpacked(file) as opened:
            if suffix != ".jsonl":
                yield from map(json.dumps, list_items(opened, longest))
                return
            for number, line in bounded_lines(opened, longest):
                if line is None:
                    yield f"{REFUSED}longer than max_row_bytes ({longest:,})"
                    continue
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield text
    except TypeError:
        raise DataError(f"{name}: is not a list of rows") from None
    except (RowTooLong, UnpacksTooFar) as error:
        raise _too_much(name, error) from None
    except UnicodeDecodeError:
        where = f" (line {number})" if number else ""
        raise DataError(f"{name}: not UTF-8 text{where}") from None
    except BROKEN_FILE as error:
        raise DataError(f"{name}: cannot be read: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a JSON list of rows: {first_line(error)}") from None


# --- folders and the Hub ---


def _read_folder(source: Source) -> datasets.Dataset:
    folder = os.path.expanduser(source.path)
    try:
        if (Path(folder) / "state.json").is_file():
            _refuse_split(source)
            return _plain_columns(datasets.load_from_disk(folder))
        if (Path(folder) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(folder)
            if source.split not in splits:
                raise DataError(f"{source}: has no split {source.split}, only {', '.join(splits)}")
            return _plain_columns(splits[source.split])
        builder = datasets.load_dataset_builder(folder, source.name)
        found = (builder.config.data_files or {}).get(source.split, [])
        files = [Path(file) for file in sorted(found)]
        suffixes = {_suffix(file) for file in files}
        # with `field` the rows are under a key of the file
        if not files or suffixes - set(JSON) or builder.config.field:
            options = _folder_options(files, builder, source)
            rows = datasets.load_dataset(folder, source.name, split=source.split, **options)
            return _plain_columns(rows)
        kinds = [_json_kind(file) for file in files]
    except NOT_LOADED as error:
        raise _unreadable(source, error) from None
    # Arrow's JSON reader crashes on a deeply nested row, and wants one schema for all rows
    return _read_json(files, kinds, source)


def _folder_options(files: list[Path], builder: Any, source: Source) -> dict[str, Any]:
    """Options for `datasets` to read a folder's files of another kind than JSON."""
    kinds = {READERS.get(_suffix(file)) for file in files}
    if len(kinds) != 1 or (kind := kinds.pop()) is None:
        return {}
    config = builder.config
    by_line = getattr(config, "sample_by", "line") == "line"
    separator = getattr(config, "sep", None) or ","
    options = _bounded(files, kind, source, by_line, separator if len(separator) == 1 else ",")
    if kind == "csv":
        options |= _csv_options(files, source, **config.pd_read_csv_kwargs)
    return options


def _json_kind(file: Path) -> str:
    """The suffix to read a folder's JSON file by: there a .json may have one row per line too."""
    with fsspec.open(str(file), "rb", compression="infer") as opened:
        start = opened.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".json" if start.startswith(b"[") else ".jsonl"


def read_hub(source: Source, streaming: bool) -> Any:
    """Load a dataset from the Hub.

    Args:
        source: names it.
        streaming: return an iterable that downloads while it is read.

    Raises:
        DataError: if it cannot be reached or loaded.
    """
    require_on_hub(source.path, "dataset", source.revision)
    try:
        return datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=streaming,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{source}: cannot be loaded: {first_line(cause)}") from None


def _plain_columns(rows: datasets.Dataset) -> datasets.Dataset:
    """The dataset without columns that have our names, and with images and audio as bytes."""
    ours = {JSON_COLUMN, ROW_COLUMN} & set(rows.column_names)
    rows = rows.remove_columns(sorted(ours)) if ours else rows
    for name, feature in rows.features.items():
        if (undecoded := _undecoded(feature)) != feature:
            rows = rows.cast_column(name, undecoded)
    return rows


def _undecoded(feature: Any) -> Any:
    """The feature with images and audio as bytes, as decoding them takes packages and time."""
    if isinstance(feature, dict):
        return {name: _undecoded(held) for name, held in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    return feature


# --- one row ---


def parse_row(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row as a mapping of columns, those in `source.columns` under the format's names too.

    Args:
        row: of `load_rows`.
        source: whose row it is.

    Raises:
        BadRow: if it is not JSON, or not a mapping.
    """
    if JSON_COLUMN in row:
        text = row[JSON_COLUMN]
        if text.startswith(REFUSED):
            raise BadRow(text.removeprefix(REFUSED) or "not JSON")  # a row of a NUL alone
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):  # also an integer of 5,000 digits
            raise BadRow("not JSON") from None
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        if len(text) < LONGEST_GAP:
            return _renamed(row, source)
    else:
        row = {name: _without_none(value) for name, value in row.items()}
    if has_gap(row):
        raise BadRow(f"more than {LONGEST_GAP:,} spaces in a row")
    return _renamed(row, source)


def _renamed(row: dict[str, Any], source: Source) -> dict[str, Any]:
    return row | {new: row[old] for new, old in source.columns.items() if old in row}


def _without_none(value: Any) -> Any:
    """A value without what its mappings lack: Arrow gives all of a column the same keys."""
    if isinstance(value, dict):
        return {name: _without_none(held) for name, held in value.items() if held is not None}
    return [_without_none(held) for held in value] if isinstance(value, list) else value


def has_gap(held: Any) -> bool:
    """Whether a text in a row has a gap of more than `LONGEST_GAP` spaces.

    Looked for in steps of half its length, since one of them lies within such a gap.
    """
    if isinstance(held, dict | list):
        return any(map(has_gap, held.values() if isinstance(held, dict) else held))
    step = LONGEST_GAP // 2
    return isinstance(held, str) and any(
        held[start : start + step].isspace()
        for start in range(0, len(held) - step + 1, step)
        if len(held) > LONGEST_GAP
    )


def columns_of(rows: datasets.Dataset, source: Source) -> list[str]:
    """The columns that identify a source's format.

    Rows of JSON each have their own: then it is the first row of a known format that counts, among
    the first 100 that can be parsed.

    Raises:
        DataError: if no row of JSON can be parsed.
    """
    if JSON_COLUMN not in rows.column_names:
        names = [name for name in rows.column_names if name != ROW_COLUMN]
        return names + [new for new, old in source.columns.items() if old in names]
    found: list[list[str]] = []
    for row in rows:
        try:
            found.append(list(parse_row(row, source)))
        except BadRow:
            continue
        if known_format(found[-1]):
            return found[-1]
        if len(found) == 100:
            break
    if not found:
        raise DataError(f"{source}: no row is a JSON object")
    return found[0]
