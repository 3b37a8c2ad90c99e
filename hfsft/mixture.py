"""Sources → the run's examples: load, check, hold out, order, encode; and count each row's fate."""

import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pandas
import pyarrow as pa
import zstandard
from accelerate import PartialState
from datasets.arrow_writer import ArrowWriter

from hfsft import conversations, templates
from hfsft.audit import (
    NOT_BAD,
    audit_console,
    audit_source,
    bad_rows,
    print_audit,
    too_many_bad_rows,
    write_audit,
)
from hfsft.conversations import (
    BadRow,
    Encoded,
    TooLong,
    content_digest,
    detect_format,
    fit_conversations,
    known_format,
    to_messages,
)
from hfsft.disk import writing_to
from hfsft.errors import DataError, first_line
from hfsft.fields import nearest
from hfsft.hub import require_on_hub
from hfsft.packing import PackedConversations
from hfsft.recipe import Source, Stage
from hfsft.tasks import TASKS, TEXTS, task_rows
from hfsft.tasks import text_rows as embedded_texts

JSON_COLUMN = "hfsft_json"  # a row as its JSON text
ROW_COLUMN = "hfsft_row"  # a row's number in its source, from 0
SOURCE_COLUMN = "source"  # the name of the source that a held-out row comes from
# what the cache holds was made by this code
CODE = hashlib.blake2b(
    b"".join(
        Path(file).read_bytes() for file in (__file__, conversations.__file__, templates.__file__)
    )
).hexdigest()
CHUNK = 2048  # examples of the run's order that are encoded, and cached, together
READERS = {".parquet": "parquet", ".csv": "csv", ".txt": "text"}
JSON = (".jsonl", ".json")
BROKEN_FILE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
# what datasets raises for a folder or a dataset that it cannot load
NOT_LOADED = (
    *(*BROKEN_FILE, ValueError, KeyError, RuntimeError, AttributeError, TypeError),
    datasets.exceptions.DatasetsError,
)
# they log an error before they raise it, and it is told then
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


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


def once(
    key: str, rows: Callable[[], Iterator[dict[str, Any]]], features: dict[str, Any]
) -> datasets.Dataset:
    """Rows that are made and written to the datasets cache once, and memory-mapped from then on.

    Args:
        key: says all that the rows depend on.
        rows: makes them; called only if the cache holds none of that key.
        features: their columns.
    """
    path = _cache_file(key)
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            with (
                writing_to(path.parent),
                ArrowWriter(path=str(partial), features=datasets.Features(features)) as writer,
            ):
                for row in rows():
                    writer.write(row)
                writer.finalize()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def _cache_file(key: str) -> Path:
    """Where the datasets cache keeps what this code makes of what `key` says."""
    name = hashlib.blake2b(f"{CODE}{key}".encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfsft"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def _content(files: list[Path]) -> str:
    """A digest of what files hold."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


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
        key = repr((key, _content(files)))
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


@dataclass(frozen=True)
class Mixture:
    """A stage's data, and what became of every row of its sources."""

    # a dataset; sft's is a `RunOrder`; of a stream, an endless one; None where nothing is left
    train: Any
    held_out: Any  # a dataset, each row with its `source`; None where the stage validates nothing
    audit: dict[str, Any]  # as `audit.write_audit` takes it
    rejected: list[dict[str, Any]]  # source, row, reason
    origins: "Origins | None" = None  # of the conversations in `train`


@dataclass(frozen=True)
class Origins:
    """Which row of which source each conversation of a training set was."""

    sources: list[str]
    # of every conversation that was encoded
    source_of: list[int]
    row_of: list[int]
    places: list[int]  # of them, those of the training set

    def __getitem__(self, conversation: int) -> dict[str, Any]:
        place = self.places[conversation]
        return {"source": self.sources[self.source_of[place]], "row": self.row_of[place]}


def settle(mixture: Mixture, stage: Stage) -> Mixture:
    """Write a mixture's audit and print its table.

    Raises:
        DataError: where `on_bad_rows` refuses its rows, or none is left to train on.
    """
    if PartialState().is_main_process:
        with writing_to(stage.folder):
            write_audit(stage.folder, mixture.audit, mixture.rejected)
        if not stage.quiet:
            print_audit(stage.name, mixture.audit, audit_console())
    sources = mixture.audit["sources"]
    for source in sources if any(source["kept"] for source in sources) else ():
        if _refuses(stage, source):
            first = next(
                entry
                for entry in mixture.rejected
                if entry["source"] == source["source"]
                and entry["reason"] in source["refused"].keys() - set(NOT_BAD)
            )
            raise DataError(
                f"{source['source']}: {bad_rows(source):,} of {source['read']:,} rows are bad, the "
                f"first is row {first['row']} ({first['reason']})\n  Each is in "
                f"{stage.folder / 'rejected.jsonl'}; to train on the rest: --on_bad_rows skip"
            )
    require_rows(mixture, stage)
    return mixture


def _refuses(stage: Stage, audit: dict[str, Any]) -> bool:
    """Whether `on_bad_rows` refuses a source."""
    if stage.on_bad_rows == "error":
        return bad_rows(audit) > 0
    return stage.on_bad_rows is None and too_many_bad_rows(audit)


def require_rows(mixture: Mixture, stage: Stage) -> None:
    """Check that a mixture has rows to train on.

    Raises:
        DataError: if all were refused; it names the first.
    """
    if mixture.train is None:
        nothing = f"{stage.name}: no row is left to train on"
        if not mixture.rejected:
            raise DataError(f"{nothing}; `weight` leaves none of so few")
        first = mixture.rejected[0]
        raise DataError(
            f"{nothing}; all were refused, the first is row {first['row']} of {first['source']} "
            f"({first['reason']})"
        )


# --- conversations ---


def mix_conversations(stage: Stage, tokenizer: Any, refuse: bool = False) -> Mixture:
    """Load, check and mix a stage's conversations, and encode those that its run uses.

    Every row is read and checked. What is held out, and any exact copy of it in any source, is
    trained on nowhere; `repeat` and `weight` copy after that. Of sft with `max_steps` only the
    rows that the run's order comes to are encoded, and those held out; those that cannot be
    trained on are passed over (`on_too_long: error` sees a long one only then). With
    `num_train_epochs`, of mid, or where `on_too_long` is split (a row is several conversations),
    every row is encoded.

    Args:
        stage: names the sources and how many conversations to hold out.
        tokenizer: as `load_tokenizer` returns it.
        refuse: encode nothing where `on_bad_rows` refuses the rows of a source.

    Returns:
        Of sft a `RunOrder`, of mid an epoch's conversations in the order of their sources; with
        `train` None where none is left, or they are refused.

    Raises:
        DataError: if a source cannot be read, or what is held out leaves nothing to train on.
    """
    with PartialState().main_process_first():
        sources = [_check_source(source, stage) for source in stage.data]
        _refuse_duplicates(sources, stage)
        kept = [(index, row) for index, source in enumerate(sources) for row in source.kept]
        prepared = _Prepared(stage, tokenizer, sources)
        audits = map(prepared.audit, range(len(sources)))
        if not kept or (refuse and any(_refuses(stage, audit) for audit in audits)):
            return Mixture(None, None, *_audit(prepared, [], [], []))
        if prepared.whole:
            prepared.encode(kept)
        held_rows = _hold_out(stage, kept, prepared)
        held = [item for index, row in held_rows for item in prepared.items[index][row]]
        prepared.hold_out(held)
        held_digests = {sources[index].digests[row] for index, row in held_rows}
        epoch = [
            (index, row)
            for index, source in enumerate(sources)
            for row in copies(
                [row for row in source.kept if source.digests[row] not in held_digests],
                source.source,
                stage.seed,
            )
        ]
        if not epoch and held:
            raise DataError(
                f"{stage.name}: held_out: {stage.held_out} leaves no conversation to train on"
            )
        if stage.name == "sft":
            places = _run_places(stage, epoch, prepared)
        else:
            places = [item for row in epoch for item in prepared.conversations(row)]
    audit, rejected = _audit(prepared, epoch, places, held_rows)
    if not places:
        return Mixture(None, None, audit, rejected)
    encoded = prepared.dataset()
    names = [str(source) for source in stage.data]
    origins = Origins(names, prepared.source_of, prepared.numbers, places)
    if stage.name == "sft":
        train = RunOrder(encoded, places, audit["train"])
        train.origins = origins
    else:
        train = encoded.select(places)
    held_out = None
    if stage.validates:
        names = [str(stage.data[prepared.source_of[item]]) for item in held]
        held_out = encoded.select(held).add_column(SOURCE_COLUMN, names)
    return Mixture(train, held_out, audit, rejected, origins)


def _audit(
    prepared: "_Prepared", epoch: list["Row"], places: list[int], held_rows: list["Row"]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What became of the rows of every source and the sizes of it all; and the refused rows."""
    stage = prepared.stage
    epoch_of: Counter[int] = Counter()
    for row in epoch:
        epoch_of[row[0]] += prepared.count(row)
    used = Counter(prepared.source_of[item] for item in places)
    held_of = Counter(index for index, row in held_rows for _ in prepared.items[index][row])
    held_digests = {prepared.sources[index].digests[row] for index, row in held_rows}
    audits = []
    for index, source in enumerate(prepared.sources):
        same = sum(source.digests[row] in held_digests for row in source.kept)
        own = sum(its_source == index for its_source, _ in held_rows)
        audits.append(
            prepared.audit(index)
            | {
                "held_out": held_of[index],
                "copies_of_held_out": same - own,
                "copies": source.source.copies,
                "train": epoch_of[index],
                "used": used[index],
            }
        )
    sizes = {"train": epoch_of.total(), "used": len(places), "held_out": held_of.total()}
    if stage.name == "sft":
        sizes |= {"different": len(set(places)), "examples_per_step": stage.examples_per_step}
    rejected = [entry for source in prepared.sources for entry in source.rejected()]
    return {"sources": audits, **sizes}, rejected


@dataclass
class _Checked:
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


def _check_source(source: Source, stage: Stage) -> _Checked:
    """Read every row of a source as messages; no text is encoded."""
    rows = load_rows(source, stage.seed)
    row_format = source.format or detect_format(_columns(rows, source), str(source))

    def check(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"digest": [], "refused": []}
        for row in _rows_of(batch):
            try:
                digest, reason = content_digest(to_messages(renamed(row, source), row_format)), ""
            except BadRow as bad:
                digest, reason = "", str(bad)
            out["digest"].append(digest)
            out["refused"].append(reason)
        return out

    key = ("checked", rows._fingerprint, row_format, source.columns)
    try:
        checked = _mapped(rows, check, CHECKED, repr(key), stage, f"{source}: read")
    except UnicodeDecodeError:  # Arrow looks into no text before it is read
        raise DataError(f"{source}: holds text that is not UTF-8") from None
    refused = {row: reason for row, reason in enumerate(checked["refused"][:]) if reason}
    return _Checked(source, rows, row_format, rows[ROW_COLUMN][:], checked["digest"][:], refused)


def _rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = [name for name in batch if name != ROW_COLUMN]
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _mapped(
    rows: datasets.Dataset,
    function: Callable[[dict[str, list[Any]]], Any],
    features: dict[str, Any],
    key: str,
    stage: Stage,
    shown: str,
) -> datasets.Dataset:
    """What a function makes of each batch of rows, in the cache under what `key` says."""
    path = _cache_file(key)
    with writing_to(path.parent):
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            num_proc=stage.dataset_num_proc if len(rows) >= 1000 else None,
            desc=shown,
            features=datasets.Features(features),
            cache_file_name=str(path),
            new_fingerprint=path.stem,
        )


def _refuse_duplicates(sources: list[_Checked], stage: Stage) -> None:
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


class _Prepared:
    """A stage's conversations, encoded as they are asked for."""

    def __init__(self, stage: Stage, tokenizer: Any, sources: list[_Checked]):
        self.stage, self.tokenizer, self.sources = stage, tokenizer, sources
        # whether every row is wanted; else those that the run's order comes to
        self.whole = stage.name != "sft" or stage.max_steps is None or stage.on_too_long == "split"
        self.positions = None if stage.max_length else model_positions(stage)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        # all that an encoded row depends on but the row
        self.key = repr(
            (
                hashlib.blake2b(backend.to_str().encode()).hexdigest(),
                *(tokenizer.chat_template, tokenizer.hfsft_training_template),
                *(stage.max_length, stage.on_too_long, stage.assistant_only_loss, self.positions),
            )
        )
        self.parts: list[datasets.Dataset] = []
        self.items: list[dict[int, list[int]]] = [{} for _ in sources]  # row → its conversations
        # of each conversation, over all parts
        self.source_of: list[int] = []
        self.numbers: list[int] = []  # of its row in the source
        self.lengths: list[int] = []
        self.trained: list[int] = []
        self.cut: list[bool] = []
        self.digests: list[str] = []  # of its tokens
        self.held_tokens: set[str] = set()

    def encode(self, rows: list[Row]) -> None:
        """Encode those rows that are not encoded yet."""
        counts = (self.lengths, self.trained, self.cut, self.digests)
        wanted: list[set[int]] = [set() for _ in self.sources]
        for index, row in rows:
            wanted[index].add(row)
        for index, source in enumerate(self.sources):
            new = sorted(wanted[index] - self.items[index].keys())
            if not new:
                continue
            part = self._encode(source, new)
            self.items[index] |= {row: [] for row in new}
            row_of = {source.numbers[row]: row for row in new}
            columns = [part[name][:] for name in (ROW_COLUMN, "refused", *COUNTED)]
            kept = []
            for place, (number, reason, *counted) in enumerate(zip(*columns, strict=True)):
                if reason:
                    source.passed_over[row_of[number]] = reason
                    continue
                kept.append(place)
                self.items[index][row_of[number]].append(len(self.source_of))
                self.source_of.append(index)
                self.numbers.append(number)
                for held, value in zip(counts, counted, strict=True):
                    held.append(value)
            self.parts.append(part.select(kept).select_columns(["input_ids", "labels", "length"]))

    def _encode(self, source: _Checked, rows: list[int]) -> datasets.Dataset:
        # the function goes to other processes: it holds no more than it needs
        stage, tokenizer, positions = self.stage, self.tokenizer, self.positions
        name, row_format = source.source, source.row_format

        def encode(batch: dict[str, list[Any]]) -> pa.Table:
            found = fit_conversations(
                [to_messages(renamed(row, name), row_format) for row in _rows_of(batch)],
                tokenizer,
                stage.max_length,
                stage.on_too_long,
                stage.assistant_only_loss,
            )
            numbers, encoded, reasons = [], [], []
            for number, fitted in zip(batch[ROW_COLUMN], found, strict=True):
                if isinstance(fitted, TooLong):
                    raise DataError(
                        f"{name}: row {number} is longer than max_length ({stage.max_length} "
                        "tokens) and on_too_long is error"
                    )
                if positions and isinstance(fitted, list) and len(fitted[0].ids) > positions:
                    fitted = BadRow("longer than the model's positions")
                reason = str(fitted) if isinstance(fitted, BadRow) else ""
                fitted = [NO_TOKENS] if isinstance(fitted, BadRow) else fitted
                numbers += [number] * len(fitted)
                encoded += fitted
                reasons += [reason] * len(fitted)
            return _table(numbers, encoded, reasons)

        selected = source.rows if len(rows) == len(source.rows) else source.rows.select(rows)
        key = ("encoded", source.rows._fingerprint, name.columns, row_format, rows, self.key)
        return _mapped(selected, encode, ENCODED, repr(key), stage, f"{name}: encode")

    def hold_out(self, held: list[int]) -> None:
        """From here on no conversation of the same tokens as one of these is given."""
        self.held_tokens = {self.digests[item] for item in held}

    def conversations(self, row: Row) -> list[int]:
        """The conversations of an encoded row that can be trained on; several if it was split.

        Rows that differ can be the same tokens: where they differ only behind `max_length`.
        """
        index, position = row
        items = self.items[index][position]
        if self.held_tokens.isdisjoint(self.digests[item] for item in items):
            return items
        self.sources[index].passed_over[position] = "the same tokens as a held-out conversation"
        return [item for item in items if self.digests[item] not in self.held_tokens]

    def count(self, row: Row) -> int:
        """How many conversations a row is; one until it is known what it becomes."""
        return len(self.conversations(row)) if self.whole else 1

    def dataset(self) -> datasets.Dataset:
        """Every conversation that was encoded, with `input_ids`, `labels` and `length`."""
        return datasets.concatenate_datasets(self.parts)

    def audit(self, index: int) -> dict[str, Any]:
        """What became of a source's rows."""
        source, items = self.sources[index], self.items[index]
        mine = [item for row in items.values() for item in row]
        return audit_source(
            str(source.source),
            read=len(source.numbers),
            kept=len(source.kept),
            lengths=[self.lengths[item] for item in mine],
            trained_tokens=sum(self.trained[item] for item in mine),
            reasons=Counter(source.refused.values()),
            passed_over=Counter(source.passed_over.values()),
            truncated=sum(self.cut[item] for item in mine),
            split=sum(len(row) > 1 for row in items.values()),
            duplicates=source.duplicates,
        )


COUNTED = ("length", "trained", "cut", "digest")
NO_TOKENS = Encoded(np.array([], np.int32), np.array([], bool))
CHECKED = {"digest": datasets.Value("string"), "refused": datasets.Value("string")}
ENCODED = {
    ROW_COLUMN: datasets.Value("int64"),
    "input_ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int32"),
    "trained": datasets.Value("int32"),
    "cut": datasets.Value("bool"),
    "digest": datasets.Value("string"),
    "refused": datasets.Value("string"),
}


def _table(numbers: list[int], encoded: list[Encoded], reasons: list[str]) -> pa.Table:
    """Encoded conversations as `ENCODED` says, without a Python object a token."""
    lengths = np.array([len(one.ids) for one in encoded], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    ids, trained = (
        np.concatenate([getattr(one, name) for one in encoded]) for name in ("ids", "trained")
    )
    labels = Encoded(ids, trained).labels
    return pa.table(
        {
            ROW_COLUMN: pa.array(numbers, pa.int64()),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
            "length": pa.array(lengths),
            "trained": pa.array([int(one.trained.sum()) for one in encoded], pa.int32()),
            "cut": pa.array([one.cut for one in encoded], pa.bool_()),
            "digest": pa.array([_tokens_digest(one.ids) for one in encoded], pa.string()),
            "refused": pa.array(reasons, pa.string()),
        }
    )


def _tokens_digest(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def _hold_out(stage: Stage, kept: list[Row], prepared: _Prepared) -> list[Row]:
    """Choose and encode what a stage holds out; another takes the place of one that is refused."""
    first: dict[str, Row] = {}  # of each different content
    for index, row in kept:
        first.setdefault(prepared.sources[index].digests[row], (index, row))
    wanted = sorted(choose_held_out(stage, sorted(first)))
    spare = sorted(first.keys() - set(wanted))
    random.Random(f"{stage.seed}:held_out:more").shuffle(spare)
    count, held = len(wanted), []
    while wanted:
        rows = [first[digest] for digest in wanted]
        prepared.encode(rows)
        held += [(index, row) for index, row in rows if prepared.items[index][row]]
        lacking = count - len(held)
        wanted, spare = spare[:lacking], spare[lacking:]
    return sorted(held)


def _run_places(stage: Stage, epoch: list[Row], prepared: _Prepared) -> list[int]:
    """The conversation of each example of the whole run, in order."""
    if stage.max_steps is not None:
        total = stage.max_steps * stage.examples_per_step
    else:
        count = sum(len(prepared.conversations(row)) for row in epoch)
        steps = math.ceil(count * stage.trainer["num_train_epochs"] / stage.examples_per_step)
        total = max(1, steps) * stage.examples_per_step
    if stage.on_too_long == "split":
        items = [item for row in epoch for item in prepared.conversations(row)]
        return list(itertools.islice(run_order(items, stage.seed), total))
    places: list[int] = []
    order, looked_at = run_order(epoch, stage.seed), 0
    while len(places) < total and (places or looked_at < len(epoch)):
        rows = list(itertools.islice(order, min(CHUNK, total - len(places))))
        prepared.encode(rows)
        places += [item for row in rows for item in prepared.conversations(row)]
        looked_at += len(rows)
    return places


def run_order(items: list[Any], seed: int) -> Iterator[Any]:
    """The order of examples, without end: one seeded permutation after another.

    Every step then has its full number of examples, also where an epoch ends within it, and neither
    the device batch, nor the number of processes, nor a larger `max_steps` changes the order.

    Args:
        items: an epoch's.
        seed: the run's.
    """
    for epoch in itertools.count() if items else ():
        order = list(range(len(items)))
        random.Random(f"{seed}:epoch:{epoch}").shuffle(order)
        yield from (items[i] for i in order)


class RunOrder(datasets.Dataset):
    """The examples of a whole run: item i is the i-th that is trained on.

    Its columns are `input_ids` and `labels`. It is a `datasets.Dataset` as trl takes no other.
    """

    origins: Origins  # of its examples

    def __init__(self, conversations: datasets.Dataset, places: list[int], epoch: int):
        """Lay out the run.

        Args:
            conversations: with `input_ids`, `labels` and `length`.
            places: the conversation of each example.
            epoch: examples of an epoch.
        """
        run = conversations.select_columns(["input_ids", "labels"]).select(places)
        super().__init__(run.data, run.info, run.split, run._indices, run._fingerprint)
        self.conversations, self.places, self.epoch = conversations, places, epoch
        lengths = conversations["length"][:]
        self.lengths = [lengths[place] for place in places]  # tokens of each example


def copies(items: list[Any], source: Source, seed: int) -> list[Any]:
    """The items of one epoch: each as often as the source says, a seeded part once more."""
    whole = int(source.copies)
    part = round(len(items) * (source.copies - whole))
    more = random.Random(f"{seed}:weight:{source}").sample(range(len(items)), part)
    return items * whole + [items[i] for i in sorted(more)]


def load_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mix a stage's conversations, write and print their audit; errors as `mix_conversations`.

    Returns:
        What to train on (sft: a `RunOrder`), and a dataset of what is held out, or None.
    """
    mixture = settle(mix_conversations(stage, tokenizer, refuse=True), stage)
    return mixture.train, mixture.held_out


def choose_held_out(stage: Stage, different: Sequence[Any]) -> set[Any]:
    """What a stage holds out, chosen by its seed.

    Args:
        stage: says how many, or which share.
        different: digests of all content, or their places: sorted, none twice.

    Raises:
        DataError: if that leaves nothing to train on.
    """
    if not stage.validates:
        return set()
    count = stage.held_out if stage.held_out >= 1 else max(1, int(stage.held_out * len(different)))
    if count >= len(different):
        kind = "documents" if stage.name == "base" else "conversations"
        raise DataError(
            f"{stage.name}: held_out: {count} of {len(different)} different {kind} leaves none to "
            "train on"
        )
    return set(random.Random(f"{stage.seed}:held_out").sample(different, int(count)))


def model_positions(stage: Stage) -> int | None:
    """How many positions the model that a stage starts from has, if its config can be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            stage.model_name_or_path,
            revision=stage.revision,
            trust_remote_code=stage.trust_remote_code,
        )
    except (OSError, ValueError, TypeError):
        return None  # a missing model is an error of its own when it is loaded
    return getattr(config, "max_position_embeddings", None)


def _columns(rows: datasets.Dataset, source: Source) -> list[str]:
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


def load_packed_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mid's data: whole conversations in rows of `max_length`, each attending to itself alone.

    Args and errors as `load_conversations`.

    Returns:
        Rows to train on, and conversations held out (None if the stage validates nothing).
    """
    mixture = settle(mix_conversations(stage, tokenizer, refuse=True), stage)
    order = packing_order(len(mixture.train), stage.seed)
    train = PackedConversations(mixture.train, stage.max_length, order)
    train.origins = mixture.origins
    return train, mixture.held_out


def packing_order(conversations: int, seed: int) -> list[int]:
    """The order in which mid lays so many conversations into rows."""
    order = list(range(conversations))
    random.Random(f"{seed}:packing").shuffle(order)
    return order
