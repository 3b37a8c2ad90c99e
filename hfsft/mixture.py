"""Sources → one dataset: load, sample, encode, hold out, repeat; and count each row's fate."""

import glob
import hashlib
import io
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import zstandard
from accelerate import PartialState
from datasets.arrow_writer import ArrowWriter
from rich.console import Console

from hfsft import conversations
from hfsft.audit import (
    NOT_BAD,
    audit_source,
    bad_rows,
    print_audit,
    too_many_bad_rows,
    write_audit,
)
from hfsft.conversations import (
    IGNORED,
    BadRow,
    TooLong,
    detect_format,
    fit_conversation,
    to_messages,
)
from hfsft.errors import DataError, first_line
from hfsft.fields import nearest
from hfsft.hub import require_on_hub
from hfsft.packing import PackedConversations
from hfsft.recipe import Source, Stage
from hfsft.tasks import TASKS, TEXTS, task_rows
from hfsft.tasks import text_rows as embedded_texts

JSON_COLUMN = "hfsft_json"  # a row as its JSON text
ROW_COLUMN = "hfsft_row"  # a row's number in its source, from 0
# datasets keeps what `map` made until its function changes, but looks into none that it calls
CODE = hashlib.blake2b(
    b"".join(Path(file).read_bytes() for file in (__file__, conversations.__file__))
).hexdigest()
READERS = {".parquet": "parquet", ".csv": "csv", ".txt": "text"}


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
    elif Path(source.path).expanduser().is_dir():
        rows = _read_folder(source)
    else:
        rows = read_hub(source, streaming=False)
    if len(rows) == 0:
        raise DataError(f"{source}: has no rows")
    if ROW_COLUMN not in rows.column_names:
        rows = rows.add_column(ROW_COLUMN, list(range(len(rows))))
    if source.rows is not None and source.rows < len(rows):
        if source.first:
            return rows.select(range(source.rows))
        kept = random.Random(f"{seed}:{source}").sample(range(len(rows)), source.rows)
        return rows.select(kept)
    return rows


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
    name = hashlib.blake2b(f"{CODE}{key}".encode(), digest_size=16).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hfsft" / f"{name}.arrow"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            with ArrowWriter(path=str(partial), features=datasets.Features(features)) as writer:
                for row in rows():
                    writer.write(row)
                writer.finalize()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


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
    if Path(path).is_file():
        return [Path(path)]
    if glob.has_magic(path):
        files = [Path(found) for found in sorted(glob.glob(path, recursive=True))]
        if not files:
            raise DataError(f"{source}: no file matches")
        return files
    if not Path(path).is_dir() and (
        path.startswith((".", "/"))
        or Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
        in (*READERS, ".jsonl", ".json")
    ):
        raise DataError(f"{source}: no such file")
    return []


def _read_files(files: list[Path], source: Source) -> datasets.Dataset:
    suffixes = {_suffix(file) for file in files}
    if len(suffixes) > 1:
        raise DataError(f"{source}: matches files of several kinds: {', '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    if suffix not in (".jsonl", ".json", *READERS):
        raise DataError(
            f"{source}: unknown kind of file {suffix!r}; known are .jsonl, .json, .csv and .txt, "
            "each also .gz or .zst, and .parquet"
        )
    _refuse_split(source)
    if suffix not in READERS:
        try:
            content = _content(files)
        except OSError as error:
            raise DataError(f"{source}: cannot be read: {first_line(error)}") from None
        lines = (line for file in files for line in _json_lines(file, suffix, source))
        return once(
            f"json:{suffix}:{content}",
            lambda: ({JSON_COLUMN: line, ROW_COLUMN: n} for n, line in enumerate(lines)),
            {JSON_COLUMN: datasets.Value("large_string"), ROW_COLUMN: datasets.Value("int64")},
        )
    options = {"sample_by": "document"} if suffix == ".txt" else {}
    try:
        rows = datasets.load_dataset(
            READERS[suffix], data_files=[str(file) for file in files], split="train", **options
        )
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, datasets.table.CastError):
            raise DataError(f"{source}: its files differ in their columns") from None
        if "corresponds to no data" in str(cause):  # a CSV that is but a header
            raise DataError(f"{source}: has no rows") from None
        raise DataError(f"{source}: cannot be read: {first_line(cause)}") from None
    if any(name.startswith("__index_level_") for name in rows.column_names):
        raise DataError(f"{source}: cannot be read: a row has more fields than the header")
    return rows


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
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{place}: cannot be read: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON list of rows: {first_line(error)}") from None
    if not isinstance(held, list):
        raise DataError(f"{place}: holds no list of rows")
    yield from (json.dumps(row) for row in held)


def _read_folder(source: Source) -> datasets.Dataset:
    folder = str(Path(source.path).expanduser())
    try:
        if (Path(folder) / "state.json").is_file():
            _refuse_split(source)
            return datasets.load_from_disk(folder)
        if (Path(folder) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(folder)
            if source.split not in splits:
                raise DataError(f"{source}: has no split {source.split} but {', '.join(splits)}")
            return splits[source.split]
        return datasets.load_dataset(folder, source.name, split=source.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be read: {first_line(error)}") from None


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
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded: {first_line(error)}") from None


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


def _digest(ids: list[int]) -> str:
    return hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Mixture:
    """A stage's data, and what became of every row of its sources."""

    train: Any  # a dataset; of a stream, an endless one
    held_out: Any  # a dataset, or None where the stage validates nothing
    audit: dict[str, Any]  # as `audit.write_audit` takes it
    rejected: list[dict[str, Any]]  # source, row, reason


def settle(mixture: Mixture, stage: Stage) -> Mixture:
    """Write a mixture's audit, print its table, and refuse it where `on_bad_rows` says so."""
    if PartialState().is_main_process:
        write_audit(stage.folder, mixture.audit, mixture.rejected)
        if not stage.quiet:
            print_audit(stage.name, mixture.audit, Console(highlight=False))
    for source in mixture.audit["sources"]:
        refuse = stage.on_bad_rows == "error" and bad_rows(source) > 0
        if refuse or (stage.on_bad_rows is None and too_many_bad_rows(source)):
            first = next(
                entry
                for entry in mixture.rejected
                if entry["source"] == source["source"] and entry["reason"] not in NOT_BAD
            )
            raise DataError(
                f"{source['source']}: {bad_rows(source):,} of {source['read']:,} rows are bad, the "
                f"first is row {first['row']} ({first['reason']})\n  Each is in "
                f"{stage.folder / 'rejected.jsonl'}; to train on the rest: --on_bad_rows skip"
            )
    return mixture


# --- conversations ---


def mix_conversations(stage: Stage, tokenizer: Any) -> Mixture:
    """Load, encode and mix a stage's conversations.

    Args:
        stage: names the sources and how many conversations to hold out.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        Conversations with `input_ids`, `labels`, `length` and `source`. What is held out, and any
        exact copy of it in any source, is in no training row; `repeat` and `weight` copy after.

    Raises:
        DataError: if a source cannot be read or nothing is left to train on.
    """
    parts, audits, rejected = [], [], []
    seen: set[str] = set()
    with PartialState().main_process_first():
        for index, source in enumerate(stage.data):
            encoded = _encode_source(source, stage, tokenizer)
            reasons = encoded["refused"][:]
            duplicates = 0
            for position, digest in enumerate(encoded["digest"]):
                if reasons[position]:
                    continue
                if digest in seen:
                    duplicates += 1
                    if stage.duplicates == "drop":
                        reasons[position] = "exact duplicate"
                seen.add(digest)
            numbers = encoded[ROW_COLUMN][:]
            rejected += [
                {"source": str(source), "row": number, "reason": reason}
                for number, reason in zip(numbers, reasons, strict=True)
                if reason
            ]
            kept = encoded.select([i for i, reason in enumerate(reasons) if not reason])
            parts.append(kept.add_column("source", [index] * len(kept)))
            audits.append(
                audit_source(
                    str(source),
                    read=len(set(numbers)),
                    lengths=kept["length"][:],
                    trained_tokens=sum(kept["trained"]),
                    reasons=Counter(reason for reason in reasons if reason),
                    truncated=sum(kept["cut"]),
                    split=len(numbers) - len(set(numbers)),
                    duplicates=duplicates,
                )
            )
    if not any(len(part) for part in parts):
        first = f" ({rejected[0]['reason']})" if rejected else ""
        raise DataError(f"{stage.name}: no row is left to train on; all were refused{first}")

    held_digests = choose_held_out(stage, [digest for part in parts for digest in part["digest"]])
    train, held = [], []
    seen = set()
    for source, part, audit in zip(stage.data, parts, audits, strict=True):
        digests = part["digest"][:]
        part = part.select_columns(["input_ids", "labels", "length", "source"])
        trained = [i for i, digest in enumerate(digests) if digest not in held_digests]
        train.append(part.select(copies(trained, source, stage.seed)))
        first_copies = []
        for i, digest in enumerate(digests):
            if digest in held_digests and digest not in seen:
                seen.add(digest)
                first_copies.append(i)
        held.append(part.select(first_copies))
        audit |= {"train": len(train[-1]), "held_out": len(held[-1])}
    train_set = datasets.concatenate_datasets(train)
    if len(train_set) == 0:
        raise DataError(
            f"{stage.name}: held_out: {stage.held_out} leaves no conversation to train on"
        )
    held_out = datasets.concatenate_datasets(held) if held_digests else None
    sizes = {"train": len(train_set), "held_out": len(held_out) if held_out is not None else 0}
    return Mixture(train_set, held_out, {"sources": audits, **sizes}, rejected)


def copies(items: list[Any], source: Source, seed: int) -> list[Any]:
    """The items of one epoch: each as often as the source says, a seeded part once more."""
    whole = int(source.copies)
    part = round(len(items) * (source.copies - whole))
    more = random.Random(f"{seed}:weight:{source}").sample(range(len(items)), part)
    return items * whole + [items[i] for i in sorted(more)]


def load_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mix a stage's conversations, write and print their audit; errors as `mix_conversations`.

    Returns:
        The conversations to train on, and those held out or None.
    """
    mixture = settle(mix_conversations(stage, tokenizer), stage)
    return mixture.train, mixture.held_out


def choose_held_out(stage: Stage, digests: list[Any]) -> set[Any]:
    """The digests of the content that a stage holds out, chosen by its seed.

    Raises:
        DataError: if that leaves nothing to train on.
    """
    if not stage.validates:
        return set()
    different = sorted(set(digests))
    count = stage.held_out if stage.held_out >= 1 else max(1, int(stage.held_out * len(different)))
    if count >= len(different):
        kind = "documents" if stage.name == "base" else "conversations"
        raise DataError(
            f"{stage.name}: held_out: {count} of {len(different)} different {kind} leaves none to "
            "train on"
        )
    return set(random.Random(f"{stage.seed}:held_out").sample(different, int(count)))


def _encode_source(source: Source, stage: Stage, tokenizer: Any) -> datasets.Dataset:
    """Encode a source's rows; what is refused has the reason under `refused` and nothing else."""
    positions = None if stage.max_length else model_positions(stage)
    rows = load_rows(source, stage.seed)
    row_format = source.format or detect_format(_columns(rows, source), str(source))

    def encode(batch: dict[str, list[Any]], _code: str = CODE) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for index, number in enumerate(batch[ROW_COLUMN]):
            row = {name: values[index] for name, values in batch.items() if name != ROW_COLUMN}
            try:
                messages = to_messages(renamed(row, source), row_format)
                encoded = fit_conversation(
                    messages,
                    tokenizer,
                    stage.max_length,
                    stage.on_too_long,
                    stage.assistant_only_loss,
                )
                if positions and len(encoded[0][0]) > positions:
                    raise BadRow("longer than the model's positions")
            except TooLong:
                raise DataError(
                    f"{source}: row {number} is longer than max_length ({stage.max_length} tokens) "
                    "and on_too_long is error"
                ) from None
            except BadRow as bad:
                encoded = [([], [], False)]
                out["refused"].append(str(bad))
            else:
                out["refused"] += [""] * len(encoded)
            for ids, labels, cut in encoded:
                out[ROW_COLUMN].append(number)
                out["input_ids"].append(ids)
                out["labels"].append(labels)
                out["length"].append(len(ids))
                out["trained"].append(sum(label != IGNORED for label in labels))
                out["digest"].append(_digest(ids))
                out["cut"].append(cut)
        return out

    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=stage.dataset_num_proc,
        desc=str(source),
        features=datasets.Features(FEATURES),
    )


FEATURES = {
    ROW_COLUMN: datasets.Value("int64"),
    "input_ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int32"),
    "trained": datasets.Value("int32"),
    "digest": datasets.Value("string"),
    "cut": datasets.Value("bool"),
    "refused": datasets.Value("string"),
}


def model_positions(stage: Stage) -> int | None:
    """How many positions the model that a stage starts from has, if its config can be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(stage.model_name_or_path, revision=stage.revision)
    except (OSError, ValueError, TypeError):
        return None  # a missing model is an error of its own when it is loaded
    return getattr(config, "max_position_embeddings", None)


def _columns(rows: datasets.Dataset, source: Source) -> list[str]:
    """The columns of a source, from its first row that can be read where rows are JSON."""
    if JSON_COLUMN not in rows.column_names:
        names = [name for name in rows.column_names if name != ROW_COLUMN]
        return names + [new for new, old in source.columns.items() if old in names]
    for row in rows:
        try:
            return list(renamed(row, source))
        except BadRow:
            continue
    raise DataError(f"{source}: no row is JSON with columns")


def load_packed_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mid's data: whole conversations in rows of `max_length`, each attending to itself alone.

    Args and errors as `load_conversations`.

    Returns:
        Rows to train on and rows held out (None if the stage validates nothing).
    """
    train, held_out = load_conversations(stage, tokenizer)
    order = list(range(len(train)))
    random.Random(f"{stage.seed}:packing").shuffle(order)
    packed_held_out = None
    if held_out is not None:
        packed_held_out = PackedConversations(
            held_out, stage.max_length, list(range(len(held_out)))
        )
    return PackedConversations(train, stage.max_length, order), packed_held_out
