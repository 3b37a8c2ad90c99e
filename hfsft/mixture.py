"""Sources → one dataset: load, sample, encode, hold out, repeat; and count each row's fate."""

import glob
import gzip
import hashlib
import itertools
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from hfsft import conversations
from hfsft.conversations import (
    IGNORED,
    BadRow,
    detect_format,
    encode_conversation,
    to_messages,
)
from hfsft.errors import DataError
from hfsft.hub import require_on_hub
from hfsft.packing import PackedConversations, cut_rows
from hfsft.recipe import Recipe, Source, Stage
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
    if source.path in TASKS:
        try:
            made = task_rows(source.path, rows=source.rows, split=source.split, seed=seed)
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
        return _json_rows([json.dumps(row) for row in made])
    if source.path in TEXTS:
        rows = datasets.Dataset.from_list(embedded_texts(source.path))
    elif files := _local_files(source):
        rows = _read_files(files, source)
    elif Path(source.path).expanduser().is_dir():
        rows = _read_folder(source)
    else:
        rows = _read_hub(source, streaming=False)
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
        or Path(path.removesuffix(".gz")).suffix in (*READERS, ".jsonl", ".json")
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
            "each also .gz, and .parquet"
        )
    _refuse_split(source)
    if suffix not in READERS:
        return _json_rows([line for file in files for line in _json_lines(file, suffix, source)])
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
        raise DataError(f"{source}: cannot be read: {_first_line(cause)}") from None
    if any(name.startswith("__index_level_") for name in rows.column_names):
        raise DataError(f"{source}: cannot be read: a row has more fields than the header")
    return rows


def _suffix(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return file.suffix if name.endswith(".parquet") else Path(name).suffix


def _refuse_split(source: Source) -> None:
    if source.split != "train":
        raise DataError(f"{source}: split: {source.split}: a file is all one split")


def _json_lines(file: Path, suffix: str, source: Source) -> list[str]:
    """Each row's JSON text."""
    place = str(source) if str(source) == str(file) else f"{source}: {file.name}"
    try:
        text = _read_text(file)
        if suffix == ".jsonl":
            return [line for line in text.split("\n") if line.strip()]
        held = json.loads(text)
        if isinstance(held, list):
            return [json.dumps(row) for row in held]
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{place}: cannot be read: {_first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON list of rows: {_first_line(error)}") from None
    raise DataError(f"{place}: holds no list of rows")


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")


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
        raise DataError(f"{source}: cannot be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_hub(source: Source, streaming: bool) -> Any:
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
        raise DataError(f"{source}: cannot be loaded: {_first_line(error)}") from None


def _renamed(row: dict[str, Any], source: Source) -> dict[str, Any]:
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


# --- conversations ---


def load_conversations(
    stage: Stage, tokenizer: Any, max_length: int | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Load, encode and mix a stage's conversations; writes `data.json` and `rejected.jsonl`.

    Args:
        stage: names the sources and how many conversations to hold out.
        tokenizer: as `load_tokenizer` returns it.
        max_length: tokens a conversation; longer ones are cut, and refused if that leaves no
            trained token. None: the stage's own.

    Returns:
        The conversations to train on and those held out (None if the stage validates nothing), with
        `input_ids`, `labels`, `length` and `source`. What is held out, and any exact copy of it in
        any source, is in no training row; copies for `repeat` are made after.

    Raises:
        DataError: if a source cannot be read or nothing is left to train on.
    """
    max_length = max_length or stage.max_length
    parts, audits, rejected = [], [], []
    with PartialState().main_process_first():
        for source in stage.data:
            encoded = _encode_source(source, stage, tokenizer, max_length)
            reasons = Counter(reason for reason in encoded["refused"] if reason)
            for number, reason in zip(encoded[ROW_COLUMN], encoded["refused"], strict=True):
                if reason:
                    rejected.append({"source": str(source), "row": number, "reason": reason})
            kept = [index for index, reason in enumerate(encoded["refused"]) if not reason]
            parts.append(encoded.select(kept))
            audits.append(_audit(source, encoded, parts[-1], reasons))
    _write_audit(stage, audits, rejected)
    if not any(len(part) for part in parts):
        first = f" ({rejected[0]['reason']})" if rejected else ""
        raise DataError(f"{stage.name}: no row is left to train on; all were refused{first}")

    held_digests = _choose_held_out(stage, [digest for part in parts for digest in part["digest"]])
    train, held = [], []
    seen: set[str] = set()
    for index, (source, part) in enumerate(zip(stage.data, parts, strict=True)):
        digests = part["digest"][:]
        part = part.add_column("source", [index] * len(part)).select_columns(
            ["input_ids", "labels", "length", "source"]
        )
        train.append(
            part.select(
                [i for i, digest in enumerate(digests) if digest not in held_digests]
                * source.repeat
            )
        )
        first_copies = []
        for i, digest in enumerate(digests):
            if digest in held_digests and digest not in seen:
                seen.add(digest)
                first_copies.append(i)
        held.append(part.select(first_copies))
    train_set = datasets.concatenate_datasets(train)
    if len(train_set) == 0:
        raise DataError(
            f"{stage.name}: held_out: {stage.held_out} leaves no conversation to train on"
        )
    return train_set, datasets.concatenate_datasets(held) if held_digests else None


def _choose_held_out(stage: Stage, digests: list[str]) -> set[str]:
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


def _encode_source(
    source: Source, stage: Stage, tokenizer: Any, max_length: int | None
) -> datasets.Dataset:
    rows = load_rows(source, stage.seed)
    row_format = source.format
    if row_format is None:
        row_format = detect_format(_columns(rows, source), str(source))
    if row_format == "text":
        raise DataError(
            f"{source}: format text is for base; {stage.name} learns from conversations"
        )

    def encode(row: dict[str, Any], _code: str = CODE) -> dict[str, Any]:
        empty = {"input_ids": [], "labels": [], "length": 0, "digest": "", "cut": False}
        try:
            messages = to_messages(_renamed(row, source), row_format)
            ids, labels = encode_conversation(messages, tokenizer, stage.assistant_only_loss)
        except BadRow as bad:
            return empty | {"refused": str(bad)}
        cut = bool(max_length) and len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):
            return empty | {"refused": "nothing left to train on"}
        return {
            "input_ids": ids,
            "labels": labels,
            "length": len(ids),
            "digest": _digest(ids),
            "cut": cut,
            "refused": "",
        }

    return rows.map(
        encode,
        remove_columns=[name for name in rows.column_names if name != ROW_COLUMN],
        num_proc=stage.dataset_num_proc,
        desc=str(source),
        features=datasets.Features(
            **{ROW_COLUMN: datasets.Value("int64")},
            input_ids=datasets.List(datasets.Value("int32")),
            labels=datasets.List(datasets.Value("int32")),
            length=datasets.Value("int32"),
            digest=datasets.Value("string"),
            cut=datasets.Value("bool"),
            refused=datasets.Value("string"),
        ),
    )


def _columns(rows: datasets.Dataset, source: Source) -> list[str]:
    """The columns of a source, from its first row that can be read where rows are JSON."""
    if JSON_COLUMN not in rows.column_names:
        names = [name for name in rows.column_names if name != ROW_COLUMN]
        return names + [new for new, old in source.columns.items() if old in names]
    for row in rows:
        try:
            return list(_renamed(row, source))
        except BadRow:
            continue
    raise DataError(f"{source}: no row is JSON with columns")


def _audit(
    source: Source, encoded: datasets.Dataset, kept: datasets.Dataset, reasons: Counter
) -> dict[str, Any]:
    lengths = sorted(kept["length"])
    return {
        "source": str(source),
        "read": len(encoded),
        "kept": len(kept),
        "repeat": source.repeat,
        "refused": dict(reasons),
        "truncated": sum(kept["cut"]),
        "tokens": sum(lengths),
        "trained_tokens": sum(
            sum(label != IGNORED for label in labels) for labels in kept["labels"]
        ),
        "length_percentiles": {
            str(percent): lengths[min(len(lengths) - 1, len(lengths) * percent // 100)]
            for percent in (5, 50, 95, 100)
            if lengths
        },
    }


def _write_audit(stage: Stage, audits: list[dict], rejected: list[dict]) -> None:
    if not PartialState().is_main_process:
        return
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "data.json").write_text(json.dumps(audits, indent=1) + "\n")
    (stage.folder / "rejected.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in rejected)
    )
    for audit in audits:
        refused = sum(audit["refused"].values())
        if refused and not stage.quiet:
            most = max(audit["refused"], key=audit["refused"].get)
            print(
                f"{audit['source']}: {refused:,} of {audit['read']:,} rows refused, most for "
                f"'{most}'; each is in {stage.folder / 'rejected.jsonl'}"
            )


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


# --- base text ---


def base_texts(stage: Stage) -> Iterator[str]:
    """The documents of the base stage, source by source, to train a tokenizer on."""
    for source in stage.data:
        if source.streaming:
            yield from _stream_texts(_open_stream(source), source)
        else:
            yield from _documents(source, stage)[0]


def load_text(recipe: Recipe, tokenizer: Any) -> tuple[Any, Any]:
    """Base's data: documents laid end to end and cut into rows of `max_length` tokens.

    Args:
        recipe: its base stage names the sources.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        Rows to train on (an endless stream if a source streams) and rows held out (None if the
        stage validates nothing). Held-out documents are in no training row.

    Raises:
        DataError: if a source cannot be read, or the text fills no row.
    """
    stage = recipe.base
    length = text_length(recipe)
    if any(source.streaming for source in stage.data):
        if len(stage.data) > 1:
            raise DataError(f"{stage.name}.data: a streaming source must be the only one")
        return _stream_rows(stage, _open_stream(stage.data[0]), tokenizer, length)
    with PartialState().main_process_first():
        documents, kept, rejected = [], 0, []
        for source in stage.data:
            texts, refused = _documents(source, stage)
            documents += texts * source.repeat
            kept += len(texts)
            rejected += [
                {"source": str(source), "row": number, "reason": "no text"} for number in refused
            ]
        digests = [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in documents]
        held = _choose_held_out(stage, digests)
        held_texts = dict(zip(digests, documents, strict=True))
        rows = []
        for texts in (
            [text for text, digest in zip(documents, digests, strict=True) if digest not in held],
            [held_texts[digest] for digest in sorted(held)],
        ):
            random.Random(f"{stage.seed}:documents").shuffle(texts)
            ids = _encode_texts(texts, tokenizer)
            rows.append(list(cut_rows(ids, tokenizer.bos_token_id, length)))
    train, held_out = rows
    if not train:
        raise DataError(
            f"base: the text fills no row of {length} tokens; give it more, or a smaller max_length"
        )
    if held and not held_out:
        raise DataError(
            f"base: held_out: {stage.held_out} documents fill no row of {length} tokens; "
            "hold out more"
        )
    _write_audit(
        stage,
        [
            {
                "source": ", ".join(str(source) for source in stage.data),
                "read": kept + len(rejected),
                "kept": kept,
                "refused": {"no text": len(rejected)} if rejected else {},
                "tokens": len(train) * length,
                "rows": len(train),
                "held_out_rows": len(held_out),
            }
        ],
        rejected,
    )
    return (
        datasets.Dataset.from_dict({"input_ids": train}),
        datasets.Dataset.from_dict({"input_ids": held_out}) if held_out else None,
    )


def text_length(recipe: Recipe) -> int:
    """Tokens a row of base text: `base.max_length`, else the model's positions, else 2,048."""
    return recipe.base.max_length or recipe.model.get("max_position_embeddings") or 2048


def _encode_texts(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each text; a special token written in a text is read as plain text."""
    for batch in _batched(texts, 256):
        yield from tokenizer(batch, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _documents(source: Source, stage: Stage) -> tuple[list[str], list[int]]:
    """The texts of a source that does not stream, and the numbers of the rows that have none."""
    rows = load_rows(source, stage.seed)
    if JSON_COLUMN in rows.column_names:
        texts = []
        for row in rows:
            try:
                texts.append(_renamed(row, source).get("text"))
            except BadRow:
                texts.append(None)
    else:
        column = source.columns.get("text", "text")
        _require_column(source, rows.column_names)
        texts = rows[column]
    kept = [text for text in texts if _is_text(text)]
    if not kept:
        raise DataError(f"{source}: no row has any text under 'text'")
    refused = [
        number for number, text in zip(rows[ROW_COLUMN], texts, strict=True) if not _is_text(text)
    ]
    return kept, refused


def _is_text(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(text.strip()) and bool(text.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _require_column(source: Source, names: list[str]) -> None:
    column = source.columns.get("text", "text")
    if column not in names:
        others = ", ".join(name for name in names if name != ROW_COLUMN)
        raise DataError(
            f"{source}: has no column '{column}' but {others}; name its text with "
            "`columns: {text: YOUR_COLUMN}`"
        )


def _open_stream(source: Source) -> datasets.IterableDataset:
    if Path(source.path).expanduser().exists():
        raise DataError(f"{source}: streaming is for datasets on the Hub; leave it out")
    stream = _read_hub(source, streaming=True)
    if stream.column_names is not None:
        _require_column(source, stream.column_names)
    return stream


def _stream_texts(stream: Iterable[dict[str, Any]], source: Source) -> Iterator[str]:
    column = source.columns.get("text", "text")
    return (row[column] for row in stream if _is_text(row.get(column)))


def _stream_rows(
    stage: Stage, stream: datasets.IterableDataset, tokenizer: Any, length: int
) -> tuple[Any, Any]:
    """An endless stream of rows, tokenized while it is read; the first documents are held out."""
    source = stage.data[0]
    held: set[str] = set()
    count, held_out = 0, None
    if stage.validates:
        if stage.held_out < 1:
            raise DataError(
                f"{stage.name}.held_out: {stage.held_out} is a share, but a stream's length is not "
                "known; give a number of documents"
            )
        count = int(stage.held_out)
        texts = list(_stream_texts(stream.take(count), source))
        rows = list(cut_rows(_encode_texts(texts, tokenizer), tokenizer.bos_token_id, length))
        if not rows:
            raise DataError(
                f"{stage.name}: held_out: {count} documents fill no row of {length} tokens"
            )
        held = set(texts)
        held_out = datasets.Dataset.from_dict({"input_ids": rows})

    def endless_rows() -> Iterator[dict[str, list[int]]]:
        shuffled = stream.skip(count).shuffle(seed=stage.seed, buffer_size=10_000)
        for epoch in itertools.count():
            shuffled.set_epoch(epoch)
            texts = (text for text in _stream_texts(shuffled, source) if text not in held)
            row = None
            for row in cut_rows(_encode_texts(texts, tokenizer), tokenizer.bos_token_id, length):
                yield {"input_ids": row}
            if row is None:
                raise DataError(f"{source}: what is not held out fills no row of {length} tokens")

    return datasets.IterableDataset.from_generator(endless_rows), held_out
