"""Base text: documents packed into rows, in the cache or while they stream.

Memory holds one block of documents at a time, and 12 bytes per document, however large the corpus.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hfsft.data.audit import audit_source
from hfsft.data.cache import cached_rows
from hfsft.data.mixture import Mixture, accept_mixture
from hfsft.data.order import choose_held_out, copies
from hfsft.data.packing import fit_rows
from hfsft.data.rows import require_columns
from hfsft.data.sources import JSON_COLUMN, ROW_COLUMN, SOURCE_COLUMN, load_rows, parse_row
from hfsft.data.stream import (
    BLOCK,
    is_text,
    open_stream,
    open_text_stream,
    require_column,
    stream_texts,
    take_block,
)
from hfsft.errors import DataError
from hfsft.process_group import first_of_machine_first
from hfsft.recipe.schema import Recipe, Source, Stage
from hfsft.tokens.encoding import document_start, encode_texts, tokenizer_key
from hfsft.tokens.row_formats import BadRow

ROW_FEATURES = {"input_ids": datasets.List(datasets.Value("int32"))}


# --- what the base stage calls ---


def text_length(recipe: Recipe) -> int:
    """Tokens per row of base text: `base.max_length`, else the model's positions, else 2,048."""
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
    """Load base's data, and write and print its audit.

    Args:
        recipe: as `mix_text` takes it.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        Rows to train on, and rows held out or None.

    Raises:
        DataError: as `mix_text` and `accept_mixture`.
    """
    mixture = accept_mixture(mix_text(recipe, tokenizer), recipe.base)
    return mixture.train, mixture.held_out


def mix_text(recipe: Recipe, tokenizer: Any) -> Mixture:
    """Pack base's documents into rows of at most `max_length` tokens.

    The rows are cached under everything they depend on: the same recipe on the same data encodes
    nothing.

    Args:
        recipe: its base stage names the sources.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        Rows of `input_ids` (a `TextStream` if a source streams). Held-out documents, and copies of
        them, are in no training row.

    Raises:
        DataError: if a source cannot be read, or no document is left to train on.
    """
    stage, length = recipe.base, text_length(recipe)
    if any(source.streaming for source in stage.data):
        if len(stage.data) > 1:
            raise DataError(f"{stage.name}.data: a streaming source must be the only one")
        train, held_out = open_text_stream(stage, open_stream(stage.data[0]), tokenizer, length)
        return Mixture(train, held_out, {"sources": [], "train": None, "held_out": None}, [])
    with first_of_machine_first("prepares the data", stage.quiet):
        sources = [_text_rows(source, stage) for source in stage.data]
        chosen, held, audits, rejected = _choose(stage, sources)

        def packed(picked: list[np.ndarray]) -> datasets.Dataset:
            return _packed_rows(stage, sources, picked, tokenizer, length)

        train = packed(chosen)
        held_out = _held_out_rows(stage, held, packed)
    sizes = {"train": sum(map(len, chosen)), "held_out": sum(map(len, held))}
    audit = {
        "sources": audits,
        **sizes,
        "rows": len(train),
        "held_out_rows": len(held_out) if held_out is not None else 0,
        "tokens_a_row": length,
    }
    return Mixture(train, held_out, audit, rejected)


def _packed_rows(
    stage: Stage,
    sources: list[datasets.Dataset],
    picked: list[np.ndarray],
    tokenizer: Any,
    length: int,
) -> datasets.Dataset:
    """The picked documents of each source, encoded and packed, from the cache or now."""

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for source_rows, source, indices in zip(sources, stage.data, picked, strict=True):
            texts = _texts(source_rows, source, indices)
            while block := take_block(texts, BLOCK):
                ids = encode_texts(block, tokenizer)
                for row in fit_rows(ids, document_start(tokenizer), length):
                    # the writer buffers 1,000 rows: arrays take a ninth of the memory of lists
                    yield {"input_ids": np.array(row, dtype=np.int32)}

    key = [
        tokenizer_key(tokenizer),
        document_start(tokenizer),
        length,
        [
            (source_rows._fingerprint, source.columns)
            for source_rows, source in zip(sources, stage.data, strict=True)
        ],
        [hashlib.blake2b(indices.tobytes()).hexdigest() for indices in picked],
    ]
    return cached_rows(repr(key), rows, ROW_FEATURES)


def _held_out_rows(
    stage: Stage,
    held: list[np.ndarray],
    packed: Callable[[list[np.ndarray]], datasets.Dataset],
) -> datasets.Dataset | None:
    """The held-out documents in rows, no row with documents of two sources."""
    parts = []
    for index, source in enumerate(stage.data):
        if len(held[index]):
            alone = [indices if i == index else indices[:0] for i, indices in enumerate(held)]
            rows = packed(alone)
            parts.append(rows.add_column(SOURCE_COLUMN, [str(source)] * len(rows)))
    return datasets.concatenate_datasets(parts) if parts else None


# --- choosing documents ---


@dataclass(frozen=True)
class _Documents:
    """A source's texts, as far as choosing among them needs them.

    Arrays, since as Python objects these numbers would outgrow everything else in a large corpus.
    """

    digests: np.ndarray  # uint64, one per row
    lengths: np.ndarray  # uint32, characters of each row's text; 0: it has none


def _read_documents(rows: datasets.Dataset, source: Source) -> _Documents:
    """Read every text of a source."""
    digests, lengths = array("Q"), array("I")
    for text in _texts(rows, source):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest() if text else b""
        digests.append(int.from_bytes(digest))
        lengths.append(len(text or ""))
    found = _Documents(np.frombuffer(digests, np.uint64), np.frombuffer(lengths, np.uint32))
    if not found.lengths.any():
        raise DataError(f"{source}: no row has any text under 'text'")
    return found


def _choose(
    stage: Stage, sources: list[datasets.Dataset]
) -> tuple[list[np.ndarray], list[np.ndarray], list[dict[str, Any]], list[dict[str, Any]]]:
    """Choose the documents of every source.

    Returns:
        Of each source the row positions to train on, those to hold out, and the audit; and the
        refused rows of all.
    """
    documents = [
        _read_documents(rows, source) for rows, source in zip(sources, stage.data, strict=True)
    ]
    held_digests, repeated = _held_and_repeated(stage, documents)
    chosen, held, audits, rejected = [], [], [], []
    seen = np.array([], dtype=np.uint64)
    for source, rows, read in zip(stage.data, sources, documents, strict=True):
        kept = read.lengths > 0
        reasons = dict.fromkeys(np.flatnonzero(~kept).tolist(), "no text")
        duplicates, seen = _duplicates(read, kept, repeated, seen)
        if stage.duplicates == "drop":
            reasons |= dict.fromkeys(duplicates.tolist(), "exact duplicate")
            kept[duplicates] = False
        reasons = dict(sorted(reasons.items()))
        indices = rows.select(reasons)[ROW_COLUMN]
        rejected += [
            {"source": str(source), "row": index, "reason": reason}
            for index, reason in zip(indices, reasons.values(), strict=True)
        ]
        is_held = kept & _is_in(held_digests, read.digests)
        to_hold, to_train = np.flatnonzero(is_held), np.flatnonzero(kept & ~is_held)
        _, firsts = np.unique(read.digests[to_hold], return_index=True)
        held.append(to_hold[np.sort(firsts)])
        if source.copies != 1:
            to_train = np.array(copies(to_train.tolist(), source, stage.seed), dtype=np.int64)
        chosen.append(to_train)
        audit = audit_source(
            str(source),
            read=len(rows),
            lengths=array("I", read.lengths[kept].tobytes()),
            trained_tokens=0,
            reasons=Counter(reasons.values()),
            duplicates=len(duplicates),
            unit="characters",
        )
        audits.append(audit | {"train": len(chosen[-1]), "held_out": len(held[-1])})
    if not any(map(len, chosen)):
        raise DataError(f"base: held_out: {stage.held_out} leaves no document to train on")
    return chosen, held, audits, rejected


def _duplicates(
    read: _Documents, kept: np.ndarray, repeated: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of copies of earlier texts, and the repeated digests seen so far, sorted.

    Args:
        read: a source's documents.
        kept: which of them have text.
        repeated: sorted digests of the texts that several rows have.
        seen: those of them in earlier sources.
    """
    copied = np.flatnonzero(kept & _is_in(repeated, read.digests))
    values, firsts = np.unique(read.digests[copied], return_index=True)
    return np.delete(copied, firsts[~_is_in(seen, values)]), np.union1d(seen, values)


def _held_and_repeated(stage: Stage, documents: list[_Documents]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted digests of held-out texts, and of texts that several rows have."""
    every = np.concatenate([read.digests[read.lengths > 0] for read in documents])
    every.sort()
    again = np.concatenate([[False], every[1:] == every[:-1]])
    repeated, distinct = np.unique(every[again]), every[~again]
    held_out = choose_held_out(stage, range(len(distinct)))
    return distinct[sorted(held_out)], repeated


def _is_in(values: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Which digests are among sorted values; `np.isin` would sort the digests too."""
    if not len(values):
        return np.zeros(len(digests), dtype=bool)
    found = np.searchsorted(values, digests)
    return values[np.minimum(found, len(values) - 1, out=found)] == digests


# --- reading texts ---


def _text_rows(source: Source, stage: Stage) -> datasets.Dataset:
    """The rows of a source that does not stream, its text column checked unless it is JSON."""
    rows = load_rows(source, stage.seed)
    if JSON_COLUMN not in rows.column_names:
        require_column(source, rows.column_names)
    require_columns(rows, source)
    return rows


def _texts(
    rows: datasets.Dataset, source: Source, picked: np.ndarray | None = None
) -> Iterator[str | None]:
    """The text of each row, or of the picked ones; None where a row has no text.

    Args:
        rows: the source's.
        source: names the text column.
        picked: row positions, ascending; copies start over, each a further pass over the rows.
    """
    passes = [None]
    if picked is not None:
        passes = np.split(picked, np.flatnonzero(np.diff(picked) <= 0) + 1)
    for positions in passes:
        for start, column in _text_columns(rows, source):
            offsets = range(len(column))
            if positions is not None:
                first, end = np.searchsorted(positions, (start, start + len(column)))
                offsets = (positions[first:end] - start).tolist()
            for offset in offsets:
                try:
                    text = _text_of(column[offset].as_py(), rows, source)
                except UnicodeDecodeError:  # Arrow does not check a text's encoding before this
                    index = rows.select_columns(ROW_COLUMN)[start + offset][ROW_COLUMN]
                    raise DataError(f"{source}: row {index} is not UTF-8 text") from None
                yield text if is_text(text) else None


def _text_columns(rows: datasets.Dataset, source: Source) -> Iterator[tuple[int, Any]]:
    """The text or JSON column in parts: the position of a part's first row, and an Arrow array.

    A cached file of JSON rows is read instead of mapped, as mapped pages would stay resident.
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
    """The text in a cell of `_text_columns`; None if its row is not JSON or has none."""
    if JSON_COLUMN not in rows.column_names:
        return value
    try:
        return parse_row({JSON_COLUMN: value}, source).get("text")
    except BadRow:
        return None
