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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
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
    seed = seed if source.seed is None else source.seed
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


@dataclass(frozen=True)
class Mixture:
    """A stage's data, and what became of every row of its sources."""

    train: Any  # a dataset; of a stream, an endless one
    held_out: Any  # a dataset, or None where the stage validates nothing
    audit: dict[str, Any]  # as `audit.write_audit` takes it
    rejected: list[dict[str, Any]]  # source, row, reason


def _settle(mixture: Mixture, stage: Stage) -> Mixture:
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

    held_digests = _choose_held_out(stage, [digest for part in parts for digest in part["digest"]])
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
    mixture = _settle(mix_conversations(stage, tokenizer), stage)
    return mixture.train, mixture.held_out


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


def _encode_source(source: Source, stage: Stage, tokenizer: Any) -> datasets.Dataset:
    """Encode a source's rows; what is refused has the reason under `refused` and nothing else."""
    rows = load_rows(source, stage.seed)
    row_format = source.format or detect_format(_columns(rows, source), str(source))

    def encode(batch: dict[str, list[Any]], _code: str = CODE) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for index, number in enumerate(batch[ROW_COLUMN]):
            row = {name: values[index] for name, values in batch.items() if name != ROW_COLUMN}
            try:
                messages = to_messages(_renamed(row, source), row_format)
                encoded = fit_conversation(
                    messages,
                    tokenizer,
                    stage.max_length,
                    stage.on_too_long,
                    stage.assistant_only_loss,
                )
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
    """Base's data, its audit written and printed; errors as `mix_text`.

    Returns:
        Rows to train on, and rows held out or None.
    """
    mixture = _settle(mix_text(recipe, tokenizer), recipe.base)
    return mixture.train, mixture.held_out


def mix_text(recipe: Recipe, tokenizer: Any) -> Mixture:
    """Lay base's documents end to end and cut them into rows of `max_length` tokens.

    Args:
        recipe: its base stage names the sources.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        Rows of `input_ids` (an endless stream if a source streams). Held-out documents, and copies
        of them, are in no training row.

    Raises:
        DataError: if a source cannot be read, or the text fills no row.
    """
    stage = recipe.base
    length = text_length(recipe)
    if any(source.streaming for source in stage.data):
        if len(stage.data) > 1:
            raise DataError(f"{stage.name}.data: a streaming source must be the only one")
        train, held_out = _stream_rows(stage, _open_stream(stage.data[0]), tokenizer, length)
        return Mixture(train, held_out, {"sources": [], "train": None, "held_out": None}, [])
    with PartialState().main_process_first():
        read = [_documents(source, stage) for source in stage.data]
        parts, rejected, audits = _without_duplicates(stage, read)
        digests = [[_text_digest(text) for text in texts] for texts in parts]
        held = _choose_held_out(stage, [digest for part in digests for digest in part])
        train_texts: list[str] = []
        held_texts: dict[str, str] = {}
        for source, texts, marks, audit in zip(stage.data, parts, digests, audits, strict=True):
            before = len(held_texts)
            held_texts |= {
                mark: text for mark, text in zip(marks, texts, strict=True) if mark in held
            }
            seen = copies(
                [text for mark, text in zip(marks, texts, strict=True) if mark not in held],
                source,
                stage.seed,
            )
            train_texts += seen
            audit |= {"train": len(seen), "held_out": len(held_texts) - before}
        rows = []
        for texts in (train_texts, [held_texts[mark] for mark in sorted(held)]):
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
    return Mixture(
        datasets.Dataset.from_dict({"input_ids": train}),
        datasets.Dataset.from_dict({"input_ids": held_out}) if held_out else None,
        {
            "sources": audits,
            "train": len(train_texts),
            "held_out": len(held_texts),
            "rows": len(train),
            "held_out_rows": len(held_out),
            "tokens_a_row": length,
        },
        rejected,
    )


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_duplicates(
    stage: Stage, read: list[tuple[list[str], list[int], list[int]]]
) -> tuple[list[list[str]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The documents of each source, the refused rows, and each source's audit."""
    parts, rejected, audits = [], [], []
    seen: set[str] = set()
    for source, (texts, numbers, refused) in zip(stage.data, read, strict=True):
        entries = [(number, "no text") for number in refused]
        kept, duplicates = [], 0
        for text, number in zip(texts, numbers, strict=True):
            digest = _text_digest(text)
            duplicates += digest in seen
            if digest in seen and stage.duplicates == "drop":
                entries.append((number, "exact duplicate"))
            else:
                kept.append(text)
            seen.add(digest)
        parts.append(kept)
        rejected += [
            {"source": str(source), "row": number, "reason": reason} for number, reason in entries
        ]
        audits.append(
            audit_source(
                str(source),
                read=len(texts) + len(refused),
                lengths=[len(text) for text in kept],
                trained_tokens=0,
                reasons=Counter(reason for _, reason in entries),
                duplicates=duplicates,
                unit="characters",
            )
        )
    return parts, rejected, audits


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


def _documents(source: Source, stage: Stage) -> tuple[list[str], list[int], list[int]]:
    """The texts of a source, the numbers of their rows, and those of the rows that have none."""
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
    numbered = list(zip(texts, rows[ROW_COLUMN], strict=True))
    kept = [(text, number) for text, number in numbered if _is_text(text)]
    if not kept:
        raise DataError(f"{source}: no row has any text under 'text'")
    refused = [number for text, number in numbered if not _is_text(text)]
    return [text for text, _ in kept], [number for _, number in kept], refused


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
