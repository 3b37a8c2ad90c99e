"""Base text at scale: documents to rows, once into a cache, or while it streams.

Memory holds a block of documents at a time, however large the corpus.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState

from hfsft.data.audit import audit_source
from hfsft.data.cache import once
from hfsft.data.mixture import Mixture, settle
from hfsft.data.order import choose_held_out, copies
from hfsft.data.packing import fit_rows
from hfsft.data.sources import JSON_COLUMN, ROW_COLUMN, SOURCE_COLUMN, load_rows, renamed
from hfsft.data.stream import (
    BLOCK,
    block_of,
    is_text,
    open_stream,
    open_text_stream,
    require_column,
    stream_texts,
)
from hfsft.errors import DataError
from hfsft.recipe.schema import Recipe, Source, Stage
from hfsft.tokens.encoding import encode_texts
from hfsft.tokens.formats import BadRow

ROW_FEATURES = {"input_ids": datasets.List(datasets.Value("int32"))}


def text_length(recipe: Recipe) -> int:
    """Tokens a row of base text: `base.max_length`, else the model's positions, else 2,048."""
    return recipe.base.max_length or recipe.model.get("max_position_embeddings") or 2048


def base_texts(stage: Stage) -> Iterator[str]:
    """The documents of the base stage, source by source, to train a tokenizer on."""
    for source in stage.data:
        if source.streaming:
            yield from stream_texts(open_stream(source), source)
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
        train, held_out = open_text_stream(stage, open_stream(stage.data[0]), tokenizer, length)
        return Mixture(train, held_out, {"sources": [], "train": None, "held_out": None}, [])
    with PartialState().main_process_first():
        sources = [_text_rows(source, stage) for source in stage.data]
        chosen, held, audits, rejected = _choose(stage, sources)
        depends_on = [
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
                    while block := block_of(texts, BLOCK):
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
        require_column(source, rows.column_names)
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
                yield text if is_text(text) else None


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
