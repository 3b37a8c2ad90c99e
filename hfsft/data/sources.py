"""The rows of one source: built-in, local files and folders, or the Hub."""

import glob
import io
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

from hfsft.data.cache import content_of, once
from hfsft.data.tasks import TASKS, TEXTS, task_rows
from hfsft.data.tasks import text_rows as embedded_texts
from hfsft.errors import DataError, first_line, nearest
from hfsft.hub.client import require_on_hub
from hfsft.recipe.schema import Source
from hfsft.tokens.formats import BadRow, known_format

JSON_COLUMN = "hfsft_json"  # a row as its JSON text


ROW_COLUMN = "hfsft_row"  # a row's number in its source, from 0


SOURCE_COLUMN = "source"  # the name of the source that a held-out row comes from


READERS = {".parquet": "parquet", ".csv": "csv", ".txt": "text"}


JSON = (".jsonl", ".json")


BROKEN_FILE = (OSError, EOFError, zlib.error, zstandard.ZstdError)


# what datasets raises for a folder or a dataset that it cannot load
NOT_LOADED = (
    *(*BROKEN_FILE, ValueError, KeyError, RuntimeError, AttributeError, TypeError),
    datasets.exceptions.DatasetsError,
)


# --- rows of one source ---


def load_rows(source: Source, seed: int) -> datasets.Dataset:
    """The rows of a source, sampled, with each row's number under `ROW_COLUMN`.

    Rows of JSON come as their text under `JSON_COLUMN`: rows of one file need not share a schema.

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
    if source.path in TEXTS:
        rows = datasets.Dataset.from_list(embedded_texts(source.path))
    elif files := _local_files(source):
        rows = _read_files(files, source)
    elif os.path.isdir(os.path.expanduser(source.path)):
        rows = _read_folder(source)
    else:
        rows = _foreign(read_hub(source, streaming=False))
    if len(rows) == 0:
        raise DataError(f"{source}: has no rows")
    if ROW_COLUMN not in rows.column_names:
        rows = rows.add_column(ROW_COLUMN, np.arange(len(rows)))
    if source.rows is not None and source.rows < len(rows):
        if source.first:
            return rows.select(range(source.rows))
        kept = random.Random(f"{seed}:{source}").sample(range(len(rows)), source.rows)
        return rows.select(kept)
    return rows


def _foreign(rows: datasets.Dataset) -> datasets.Dataset:
    """A dataset that others made, without columns that bear our names, its pictures undecoded."""
    ours = {JSON_COLUMN, ROW_COLUMN} & set(rows.column_names)
    rows = rows.remove_columns(sorted(ours)) if ours else rows
    for name, feature in rows.features.items():
        if (undecoded := _undecoded(feature)) != feature:
            rows = rows.cast_column(name, undecoded)
    return rows


def _undecoded(feature: Any) -> Any:
    """The feature with images and sounds as bytes: to decode them takes packages and time."""
    if isinstance(feature, dict):
        return {name: _undecoded(held) for name, held in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    return feature


def _json_rows(lines: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({JSON_COLUMN: lines, ROW_COLUMN: list(range(len(lines)))})


def _reasoning_gym(source: Source, seed: int) -> list[str]:
    """Rows of one of reasoning-gym's seeded generators, 500 unless `rows` says otherwise."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"{source}: needs its package: pip install 'hfsft[tasks]'") from None
    if source.name not in DATASETS:
        hint = nearest(source.name or "", DATASETS) or ", such as chain_sum"
        raise DataError(f"{source}: name is none of its {len(DATASETS)} generators{hint}")
    made = reasoning_gym.create_dataset(source.name, size=source.rows or 500, seed=seed)
    return [
        json.dumps({"prompt": item["question"], "completion": str(item["answer"])}) for item in made
    ]


def _local_files(source: Source) -> list[Path]:
    path = os.path.expanduser(source.path)
    if os.path.isfile(path):  # unlike pathlib's it is no error where the name is too long
        return [Path(path)]
    if glob.has_magic(path):
        files: dict[str, Path] = {}  # real path → as it was found: `**` follows links
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
        options = _csv_options(files, source) if suffix == ".csv" else {}
        if suffix == ".txt":
            options = {"sample_by": "document"}
        rows = datasets.load_dataset(
            READERS[suffix], data_files=[str(file) for file in files], split="train", **options
        )
    except (*BROKEN_FILE, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise _unreadable(source, error) from None
    return _foreign(rows)


def _unreadable(source: Source, error: Exception) -> DataError:
    """What `datasets` raised, as ours."""
    cause = error.__cause__ or error
    # the second: in the types of their columns
    if isinstance(cause, datasets.table.CastError) or "Couldn't cast array" in str(cause):
        return DataError(f"{source}: its files differ in their columns")
    if "corresponds to no data" in str(cause):  # a CSV that is but a header
        return DataError(f"{source}: has no rows")
    return DataError(f"{source}: cannot be read: {first_line(cause)}")


def _csv_options(files: list[Path], source: Source, **settings: Any) -> dict[str, Any]:
    """What has `datasets` read every cell as the text it is: not `True`, `4` or `null`."""
    headers = []
    for file in files:
        start = pandas.read_csv(file, **settings | {"nrows": 1, "chunksize": None, "dtype": str})
        if not isinstance(start.index, pandas.RangeIndex):  # pandas took the first for a label
            raise DataError(f"{source}: cannot be read: a row has more fields than the header")
        headers.append(list(start.columns))
    if any(header != headers[0] for header in headers):
        raise DataError(f"{source}: its files differ in their columns")
    features = datasets.Features(dict.fromkeys(headers[0], datasets.Value("string")))
    return {"keep_default_na": False, "features": features}


def _read_json(files: list[Path], suffixes: list[str], source: Source) -> datasets.Dataset:
    """Rows of JSON files, each read as its suffix says: a list, or a row a line."""
    try:
        key = [
            (suffix, os.path.getsize(file)) for file, suffix in zip(files, suffixes, strict=True)
        ]
        key = repr((key, content_of(files)))
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {first_line(error)}") from None
    lines = (
        line
        for file, suffix in zip(files, suffixes, strict=True)
        for line in _json_lines(file, suffix, source)
    )
    return once(
        f"json:{key}",
        lambda: ({JSON_COLUMN: line, ROW_COLUMN: n} for n, line in enumerate(lines)),
        {JSON_COLUMN: datasets.Value("large_string"), ROW_COLUMN: datasets.Value("int64")},
    )


def _suffix(file: Path) -> str:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    return file.suffix if name.endswith(".parquet") else Path(name).suffix


def _refuse_split(source: Source) -> None:
    if source.split != "train":
        raise DataError(f"{source}: split: {source.split}: a file is all one split")


def _json_lines(file: Path, suffix: str, source: Source) -> Iterator[str]:
    """Each row's JSON text, line by line of a .jsonl, from the list of a .json."""
    place = str(source) if str(source) == str(file) else f"{source}: {file.name}"
    number = 0
    try:
        with fsspec.open(str(file), "rb", compression="infer") as opened:
            if suffix == ".jsonl":
                # of the readers zstandard's alone gives no lines
                for number, line in enumerate(io.BufferedReader(opened), 1):
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                    if text.strip():
                        yield text
                return
            held = json.loads(opened.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        where = f" (line {number})" if number else ""
        raise DataError(f"{place}: not UTF-8 text{where}") from None
    except BROKEN_FILE as error:
        raise DataError(f"{place}: cannot be read: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON list of rows: {first_line(error)}") from None
    if not isinstance(held, list):
        raise DataError(f"{place}: holds no list of rows")
    yield from (json.dumps(row) for row in held)


def _read_folder(source: Source) -> datasets.Dataset:
    folder = os.path.expanduser(source.path)
    try:
        if (Path(folder) / "state.json").is_file():
            _refuse_split(source)
            return _foreign(datasets.load_from_disk(folder))
        if (Path(folder) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(folder)
            if source.split not in splits:
                raise DataError(f"{source}: has no split {source.split} but {', '.join(splits)}")
            return _foreign(splits[source.split])
        builder = datasets.load_dataset_builder(folder, source.name)
        found = (builder.config.data_files or {}).get(source.split, [])
        files = [Path(file) for file in sorted(found)]
        suffixes = {_suffix(file) for file in files}
        if not files or suffixes - set(JSON) or builder.config.field:  # rows under a key of a file
            options = {}
            if suffixes == {".csv"}:
                options = _csv_options(files, source, **builder.config.pd_read_csv_kwargs)
            rows = datasets.load_dataset(folder, source.name, split=source.split, **options)
            return _foreign(rows)
        kinds = [_json_kind(file) for file in files]
    except NOT_LOADED as error:
        raise _unreadable(source, error) from None
    # Arrow's reader of JSON dies of a deep row, and wants one schema of all rows
    return _read_json(files, kinds, source)


def _json_kind(file: Path) -> str:
    """How a JSON file of a folder is written: there a .json may have a row a line, too."""
    with fsspec.open(str(file), "rb", compression="infer") as opened:
        start = opened.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".json" if start.startswith(b"[") else ".jsonl"


def read_hub(source: Source, streaming: bool) -> Any:
    """A dataset on the Hub.

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


def renamed(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """The row with the columns that `source.columns` names under the format's own names."""
    if JSON_COLUMN in row:
        try:
            row = json.loads(row[JSON_COLUMN])
        except (ValueError, RecursionError):  # also an integer of 5,000 digits
            raise BadRow("not JSON") from None
        if not isinstance(row, dict):
            raise BadRow("not a mapping of columns")
    return row | {new: row[old] for new, old in source.columns.items() if old in row}


def columns_of(rows: datasets.Dataset, source: Source) -> list[str]:
    """The columns of a source; where rows are JSON, those of the first that tells a format.

    It is looked for in the first 100 that can be read.
    """
    if JSON_COLUMN not in rows.column_names:
        names = [name for name in rows.column_names if name != ROW_COLUMN]
        return names + [new for new, old in source.columns.items() if old in names]
    found: list[list[str]] = []
    for row in rows:
        try:
            found.append(list(renamed(row, source)))
        except BadRow:
            continue
        if known_format(found[-1]):
            return found[-1]
        if len(found) == 100:
            break
    if not found:
        raise DataError(f"{source}: no row is JSON with columns")
    return found[0]
