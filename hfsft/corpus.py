"""Base text at scale: documents to rows, once into a cache, or while it streams.

Memory holds a block of documents at a time, however large the corpus.
"""

import copy
import hashlib
import os
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState

from hfsft import packing
from hfsft.audit import audit_source
from hfsft.conversations import BadRow, encode_texts
from hfsft.errors import DataError
from hfsft.mixture import (
    JSON_COLUMN,
    ROW_COLUMN,
    SOURCE_COLUMN,
    Mixture,
    choose_held_out,
    copies,
    load_rows,
    once,
    read_hub,
    renamed,
    settle,
)
from hfsft.packing import fit_rows
from hfsft.recipe import Recipe, Source, Stage

BLOCK = 2048  # documents that are encoded and laid into rows together,
BLOCK_CHARACTERS = 16_000_000  # as far as they are no longer than this: their tokens take 250 MB
# the cache keeps rows until what makes them changes
CODE = hashlib.blake2b(
    b"".join(Path(file).read_bytes() for file in (__file__, packing.__file__))
).hexdigest()
ROW_FEATURES = {"input_ids": datasets.List(datasets.Value("int32"))}


def text_length(recipe: Recipe) -> int:
    """Tokens a row of base text: `base.max_length`, else the model's positions, else 2,048."""
    return recipe.base.max_length or recipe.model.get("max_position_embeddings") or 2048


def base_texts(stage: Stage) -> Iterator[str]:
    """The documents of the base stage, source by source, to train a tokenizer on."""
    for source in stage.data:
        if source.streaming:
            yield from _stream_texts(_open_stream(source), source)
        else:
            texts = _texts(_text_rows(source, stage), source)
            yield from (text for text in texts if text is not None)


def load_text(recipe: Recipe, tokenizer: Any) -> tuple[Any, Any]:
    """Base's data, its audit written and printed; errors as `mix_text`.

    Returns:
        Rows to train on, and rows held out or None.
    """
    mixture = settle(mix_text(recipe, tokenizer), recipe.base)
    return mixture.train, mixture.held_out


def mix_text(recipe: Recipe, tokenizer: Any) -> Mixture:
    """Lay base's documents into rows of at most `max_length` tokens.

    What the rows depend on names them in the cache: the same recipe on the same data encodes none.

    Args:
        recipe: its base stage names the sources.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        Rows of `input_ids` (a `TextStream` if a source streams). Held-out documents, and copies of
        them, are in no training row.

    Raises:
        DataError: if a source cannot be read, or the text fills no row.
    """
    stage, length = recipe.base, text_length(recipe)
    if any(source.streaming for source in stage.data):
        if len(stage.data) > 1:
            raise DataError(f"{stage.name}.data: a streaming source must be the only one")
        train, held_out = open_text_stream(stage, _open_stream(stage.data[0]), tokenizer, length)
        return Mixture(train, held_out, {"sources": [], "train": None, "held_out": None}, [])
    with PartialState().main_process_first():
        sources = [_text_rows(source, stage) for source in stage.data]
        chosen, held, audits, rejected = _choose(stage, sources)
        depends_on = [
            CODE,
            tokenizer.backend_tokenizer.to_str(),
            length,
            [
                (rows._fingerprint, source.columns)
                for rows, source in zip(sources, stage.data, strict=True)
            ],
        ]

        def rows_of(picked: list[np.ndarray]) -> datasets.Dataset:
            def made() -> Iterator[dict[str, np.ndarray]]:
                for rows, source, indices in zip(sources, stage.data, picked, strict=True):
                    texts = _texts(rows, source, indices)
                    while block := _block(texts, BLOCK):
                        ids = encode_texts(block, tokenizer)
                        for row in fit_rows(ids, tokenizer.bos_token_id, length):
                            # the writer gathers 1,000 rows: as arrays they take a ninth
                            yield {"input_ids": np.array(row, dtype=np.int32)}

            digests = [hashlib.blake2b(indices.tobytes()).hexdigest() for indices in picked]
            return once(repr([*depends_on, digests]), made, ROW_FEATURES)

        train = rows_of(chosen)
        held_out = _held_rows(stage, held, rows_of)
    sizes = {"train": sum(map(len, chosen)), "held_out": sum(map(len, held))}
    audit = {
        "sources": audits,
        **sizes,
        "rows": len(train),
        "held_out_rows": len(held_out) if held_out is not None else 0,
        "tokens_a_row": length,
    }
    return Mixture(train, held_out, audit, rejected)


def _held_rows(
    stage: Stage,
    held: list[np.ndarray],
    rows_of: Callable[[list[np.ndarray]], datasets.Dataset],
) -> datasets.Dataset | None:
    """What is held out in rows, those of each source by themselves."""
    parts = []
    for index, source in enumerate(stage.data):
        if len(held[index]):
            alone = [rows if i == index else rows[:0] for i, rows in enumerate(held)]
            rows = rows_of(alone)
            parts.append(rows.add_column(SOURCE_COLUMN, [str(source)] * len(rows)))
    return datasets.concatenate_datasets(parts) if parts else None


def _choose(
    stage: Stage, sources: list[datasets.Dataset]
) -> tuple[list[np.ndarray], list[np.ndarray], list[dict[str, Any]], list[dict[str, Any]]]:
    """Which rows of each source are trained on and held out, the audits, and the refused rows.

    Numbers are kept in arrays: as Python objects they would outgrow all else in a large corpus.
    """
    digests, lengths = [], []
    for rows, source in zip(sources, stage.data, strict=True):
        marks, sizes = array("Q"), array("I")
        for text in _texts(rows, source):
            mark = hashlib.blake2b(text.encode(), digest_size=8).digest() if text else b""
            marks.append(int.from_bytes(mark))
            sizes.append(len(text or ""))
        digests.append(np.frombuffer(marks, dtype=np.uint64))
        lengths.append(np.frombuffer(sizes, dtype=np.uint32))
        if not lengths[-1].any():
            raise DataError(f"{source}: no row has any text under 'text'")
    held_marks, repeated = _held_and_repeated(stage, digests, lengths)

    chosen, held, audits, rejected = [], [], [], []
    seen = np.array([], dtype=np.uint64)
    for source, rows, marks, sizes in zip(stage.data, sources, digests, lengths, strict=True):
        kept = sizes > 0
        reasons = dict.fromkeys(np.flatnonzero(~kept).tolist(), "no text")
        again = np.flatnonzero(kept & _is_in(repeated, marks))
        values, firsts = np.unique(marks[again], return_index=True)
        again = np.delete(again, firsts[~_is_in(seen, values)])
        seen = np.union1d(seen, values)
        if stage.duplicates == "drop":
            reasons |= dict.fromkeys(again.tolist(), "exact duplicate")
            kept[again] = False
        reasons = dict(sorted(reasons.items()))
        numbers = rows.select(reasons)[ROW_COLUMN]
        rejected += [
            {"source": str(source), "row": number, "reason": reason}
            for number, reason in zip(numbers, reasons.values(), strict=True)
        ]
        is_held = kept & _is_in(held_marks, marks)
        to_hold, to_train = np.flatnonzero(is_held), np.flatnonzero(kept & ~is_held)
        _, firsts = np.unique(marks[to_hold], return_index=True)
        held.append(to_hold[np.sort(firsts)])
        if source.copies != 1:
            to_train = np.array(copies(to_train.tolist(), source, stage.seed), dtype=np.int64)
        chosen.append(to_train)
        audit = audit_source(
            str(source),
            read=len(rows),
            lengths=array("I", sizes[kept].tobytes()),
            trained_tokens=0,
            reasons=Counter(reasons.values()),
            duplicates=len(again),
            unit="characters",
        )
        audits.append(audit | {"train": len(chosen[-1]), "held_out": len(held[-1])})
    if not any(map(len, chosen)):
        raise DataError(f"base: held_out: {stage.held_out} leaves no document to train on")
    return chosen, held, audits, rejected


def _held_and_repeated(
    stage: Stage, digests: list[np.ndarray], lengths: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The sorted digests of texts that are held out, and of those that several rows have."""
    every = np.concatenate([m[sizes > 0] for m, sizes in zip(digests, lengths, strict=True)])
    every.sort()
    again = np.concatenate([[False], every[1:] == every[:-1]])
    repeated, different = np.unique(every[again]), every[~again]
    held_out = choose_held_out(stage, range(len(different)))
    return different[sorted(held_out)], repeated


def _is_in(values: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Which marks are among sorted values; `np.isin` would sort the marks too."""
    if not len(values):
        return np.zeros(len(marks), dtype=bool)
    places = np.searchsorted(values, marks)
    return values[np.minimum(places, len(values) - 1, out=places)] == marks


def _text_rows(source: Source, stage: Stage) -> datasets.Dataset:
    """The rows of a source that does not stream; its text column is there, unless it is JSON."""
    rows = load_rows(source, stage.seed)
    if JSON_COLUMN not in rows.column_names:
        _require_column(source, rows.column_names)
    return rows


def _texts(
    rows: datasets.Dataset, source: Source, picked: np.ndarray | None = None
) -> Iterator[str | None]:
    """The text of each row, or of those picked, None where it has none.

    What is picked ascends, or does so several times: each is a pass over the rows.
    """
    passes = [None]
    if picked is not None:
        passes = np.split(picked, np.flatnonzero(np.diff(picked) <= 0) + 1)
    for run in passes:
        for start, column in _text_columns(rows, source):
            places = range(len(column))
            if run is not None:
                first, end = np.searchsorted(run, (start, start + len(column)))
                places = (run[first:end] - start).tolist()
            for place in places:
                try:
                    text = _text_of(column[place].as_py(), rows, source)
                except UnicodeDecodeError:  # Arrow looks into no text before it is read
                    number = rows.select_columns(ROW_COLUMN)[start + place][ROW_COLUMN]
                    raise DataError(f"{source}: row {number} is not UTF-8 text") from None
                yield text if _is_text(text) else None


def _text_columns(rows: datasets.Dataset, source: Source) -> Iterator[tuple[int, Any]]:
    """The column of text, or of JSON, part by part: its first row's position, and an Arrow array.

    A file of JSON rows is read part by part too: the pages of a mapped one stay resident.
    """
    is_json = JSON_COLUMN in rows.column_names
    if is_json and rows.cache_files and source.rows is None:
        start = 0
        for file in rows.cache_files:
            with pa.OSFile(file["filename"]) as opened, pa.ipc.open_stream(opened) as batches:
                for batch in batches:
                    yield start, batch[JSON_COLUMN]
                    start += len(batch)
        return
    name = JSON_COLUMN if is_json else source.columns.get("text", "text")
    column = rows.select_columns(name).with_format("arrow")
    for start in range(0, len(rows), 1000):
        yield start, column[start : start + 1000][name]


def _text_of(value: Any, rows: datasets.Dataset, source: Source) -> Any:
    if JSON_COLUMN not in rows.column_names:
        return value
    try:
        return renamed({JSON_COLUMN: value}, source).get("text")
    except BadRow:
        return None


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


def _block(texts: Iterator[str], size: int) -> list[str]:
    """The next texts, `size` of them, or fewer where they are long: memory bounds them too."""
    block, characters = [], 0
    while len(block) < size and characters < BLOCK_CHARACTERS:
        text = next(texts, None)
        if text is None:
            break
        block.append(text)
        characters += len(text)
    return block


# --- streams ---


def _open_stream(source: Source) -> datasets.IterableDataset:
    if os.path.exists(os.path.expanduser(source.path)):
        raise DataError(f"{source}: streaming is for datasets on the Hub; leave it out")
    stream = read_hub(source, streaming=True)
    if stream.column_names is not None:
        _require_column(source, stream.column_names)
    return stream


def _stream_texts(stream: Iterable[dict[str, Any]], source: Source) -> Iterator[str]:
    column = source.columns.get("text", "text")
    return (row[column] for row in stream if _is_text(row.get(column)))


def open_text_stream(
    stage: Stage, stream: datasets.IterableDataset, tokenizer: Any, length: int
) -> tuple["TextStream", Any]:
    """A stream's rows to train on, and those of its first documents, which are held out."""
    source = stage.data[0]
    if not stage.validates:
        return TextStream(stream, source, tokenizer, length, stage.seed, set()), None
    if stage.held_out < 1:
        raise DataError(
            f"{stage.name}.held_out: {stage.held_out} is a share, but a stream's length is not "
            "known; give a number of documents"
        )
    count = int(stage.held_out)
    texts = list(_stream_texts(stream.take(count), source))
    if not texts:
        raise DataError(f"{stage.name}: held_out: the first {count} documents have no text")
    rows = fit_rows(encode_texts(texts, tokenizer), tokenizer.bos_token_id, length)
    train = TextStream(stream.skip(count), source, tokenizer, length, stage.seed, set(texts))
    held_out = {"input_ids": rows, SOURCE_COLUMN: [str(source)] * len(rows)}
    return train, datasets.Dataset.from_dict(held_out)


class TextStream(torch.utils.data.IterableDataset):
    """Rows of a streaming source, encoded while it is read, epoch after epoch, without end.

    Documents are read in blocks; each block is shuffled, encoded and laid into rows while the one
    before it is trained on. A block depends on the seed, the epoch and its number alone: to go on
    from a row, one block is made again and nothing before it is read.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        source: Source,
        tokenizer: Any,
        length: int,
        seed: int,
        held_out: set[str],
        block: int = BLOCK,
    ):
        """Set the stream up; nothing is read yet.

        Args:
            stream: the documents' rows.
            source: names the column of their text.
            tokenizer: encodes them.
            length: tokens a row.
            seed: of the order within a block.
            held_out: documents to leave out wherever they turn up.
            block: documents a block.
        """
        self.stream, self.source, self.tokenizer = stream, source, tokenizer
        self.length, self.seed, self.held_out, self.block = length, seed, held_out, block
        self.beginning = copy.deepcopy(stream.state_dict())
        self.start = {"epoch": 0, "block": 0, "stream": self.beginning}
        self.skip = self.given = 0  # rows to pass over in the first block; rows before it
        # where each block that may still be trained on began: rows given before it, its position
        self.marks: deque[tuple[int, dict[str, Any]]] = deque()

    def state_after(self, rows: int) -> dict[str, Any]:
        """What `go_on` needs to give the row that follows the first `rows` ones."""
        while len(self.marks) > 1 and self.marks[1][0] <= rows:
            self.marks.popleft()
        before, position = self.marks[0]
        return {"position": position, "skip": rows - before, "given": rows}

    def go_on(self, state: dict[str, Any]) -> None:
        """Begin behind the row that `state_after` was asked for."""
        self.start, self.skip = state["position"], state["skip"]
        self.given = state["given"] - state["skip"]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        skip, given = self.skip, self.given
        with ThreadPoolExecutor(max_workers=1) as reader:
            blocks = self._blocks()
            ahead = reader.submit(next, blocks)
            while True:
                position, rows = ahead.result()
                ahead = reader.submit(next, blocks)
                self.marks.append((given, position))
                for row in rows[skip:]:
                    yield {"input_ids": row}
                given, skip = given + len(rows), 0

    def _blocks(self) -> Iterator[tuple[dict[str, Any], list[list[int]]]]:
        epoch, number, place = self.start["epoch"], self.start["block"], self.start["stream"]
        while True:
            self.stream.load_state_dict(copy.deepcopy(place))
            texts = _stream_texts(iter(self.stream), self.source)
            while block := _block(texts, self.block):
                position = {"epoch": epoch, "block": number, "stream": place}
                # taken behind the block: before its first row a loaded stream does not know it
                place = copy.deepcopy(self.stream.state_dict())
                block = [text for text in block if text not in self.held_out]
                yield position, self._rows(block, epoch, number)
                number += 1
            if number == 0:
                raise DataError(f"{self.source}: holds no text but what is held out")
            epoch, number, place = epoch + 1, 0, self.beginning

    def _rows(self, texts: list[str], epoch: int, number: int) -> list[list[int]]:
        order = random.Random(f"{self.seed}:{epoch}:{number}")
        order.shuffle(texts)
        ids = encode_texts(texts, self.tokenizer)
        rows = fit_rows(ids, self.tokenizer.bos_token_id, self.length)
        order.shuffle(rows)
        return rows
