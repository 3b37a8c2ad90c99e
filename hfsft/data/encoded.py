"""Conversations encoded on demand: only the rows that a run uses, each once, through the cache."""

import hashlib
from collections import Counter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hfsft.data.audit import audit_source
from hfsft.data.cache import cached_map
from hfsft.data.rows import Row, SourceRows, rows_of_batch
from hfsft.data.sources import ROW_COLUMN, parse_row
from hfsft.errors import DataError
from hfsft.hub.client import NOT_LOADED
from hfsft.recipe.schema import Stage
from hfsft.tokens.encoding import Encoded, TooLong, fit_conversations, tokenizer_key
from hfsft.tokens.row_formats import BadRow, read_row

# the columns of a cached conversation; a refused row has one entry, without tokens
FEATURES = {
    ROW_COLUMN: datasets.Value("int64"),
    "input_ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int32"),
    "trained": datasets.Value("int32"),
    "truncated": datasets.Value("bool"),
    "digest": datasets.Value("string"),
    "refused": datasets.Value("string"),
    "left_out": datasets.Value("string"),
}
COUNTED = ("length", "trained", "truncated", "digest")
NO_TOKENS = Encoded(np.array([], np.int32), np.array([], bool))


class EncodedConversations:
    """A stage's conversations, encoded as they are asked for.

    A row is a `Row`: source and position. What it becomes is one conversation, several (split), or
    none (refused); conversations are numbered in the order they are encoded.
    """

    def __init__(self, stage: Stage, tokenizer: Any, sources: list[SourceRows]):
        """Set up; nothing is encoded yet.

        Args:
            stage: how to encode.
            tokenizer: as `load_tokenizer` returns it.
            sources: the stage's, checked.
        """
        self.stage, self.tokenizer, self.sources = stage, tokenizer, sources
        # whether every row is encoded, rather than those the run's order reaches
        self.all_rows = (
            stage.name != "sft" or stage.max_steps is None or stage.on_too_long == "split"
        )
        self.positions = None if stage.max_length else model_positions(stage)
        self.key = self._cache_key()
        self.parts: list[datasets.Dataset] = []
        self.items: list[dict[int, list[int]]] = [{} for _ in sources]  # row → its conversations
        # of each conversation, over all parts
        self.source_of: list[int] = []
        self.row_of: list[int] = []  # its row's index in the source
        self.lengths: list[int] = []
        self.trained: list[int] = []
        self.truncated: list[bool] = []
        self.digests: list[str] = []  # of its tokens
        self.held_out_digests: set[str] = set()
        # of each source, what the chat template left out of conversations, with counts
        self.left_out: list[Counter[str]] = [Counter() for _ in sources]

    def _cache_key(self) -> str:
        """Everything that an encoded row depends on, except the row and the code."""
        stage, tokenizer = self.stage, self.tokenizer
        return repr(
            (
                tokenizer_key(tokenizer),
                *(tokenizer.chat_template, tokenizer.hfsft_training_template),
                *(stage.max_length, stage.on_too_long, stage.assistant_only_loss, self.positions),
            )
        )

    def encode(self, rows: list[Row]) -> None:
        """Encode those of the rows that are not encoded yet."""
        wanted: list[set[int]] = [set() for _ in self.sources]
        for index, row in rows:
            wanted[index].add(row)
        for index, source in enumerate(self.sources):
            new = sorted(wanted[index] - self.items[index].keys())
            if new:
                self._add(index, new, self._encoded_rows(source, new))

    def _add(self, index: int, rows: list[int], part: datasets.Dataset) -> None:
        """Number the conversations of newly encoded rows, and note why others were refused."""
        source, items = self.sources[index], self.items[index]
        items |= {row: [] for row in rows}
        position_of = {source.indices[row]: row for row in rows}
        counts = (self.lengths, self.trained, self.truncated, self.digests)
        columns = [part[name][:] for name in (ROW_COLUMN, "refused", *COUNTED)]
        self.left_out[index] += Counter(name for name in part["left_out"][:] if name)
        kept = []
        for entry, (row_index, reason, *counted) in enumerate(zip(*columns, strict=True)):
            row = position_of[row_index]
            if reason:
                source.excluded[row] = reason
                continue
            kept.append(entry)
            items[row].append(len(self.source_of))
            self.source_of.append(index)
            self.row_of.append(row_index)
            for values, value in zip(counts, counted, strict=True):
                values.append(value)
        self.parts.append(part.select(kept).select_columns(["input_ids", "labels", "length"]))

    def _encoded_rows(self, source: SourceRows, rows: list[int]) -> datasets.Dataset:
        """Rows of a source as `FEATURES`, from the cache or encoded now."""
        # the function is pickled for other processes, so it must not hold `self`
        stage, tokenizer, positions = self.stage, self.tokenizer, self.positions
        name, row_format = source.source, source.row_format

        def encode(batch: dict[str, list[Any]]) -> pa.Table:
            found = fit_conversations(
                [read_row(parse_row(row, name), row_format) for row in rows_of_batch(batch)],
                tokenizer,
                stage.max_length,
                stage.on_too_long,
                stage.assistant_only_loss,
            )
            indices, encoded, reasons = [], [], []
            for row_index, fitted in zip(batch[ROW_COLUMN], found, strict=True):
                if isinstance(fitted, TooLong):
                    raise DataError(
                        f"{name}: row {row_index} is longer than max_length ({stage.max_length} "
                        "tokens) and on_too_long is error"
                    )
                if positions and isinstance(fitted, list) and len(fitted[0].ids) > positions:
                    fitted = BadRow("longer than the model's context")
                reason = str(fitted) if isinstance(fitted, BadRow) else ""
                fitted = [NO_TOKENS] if isinstance(fitted, BadRow) else fitted
                indices += [row_index] * len(fitted)
                encoded += fitted
                reasons += [reason] * len(fitted)
            return _table(indices, encoded, reasons)

        selected = source.rows if len(rows) == len(source.rows) else source.rows.select(rows)
        key = ("encoded", source.rows._fingerprint, name.columns, row_format, rows, self.key)
        return cached_map(selected, encode, FEATURES, repr(key), stage, f"{name}: encode")

    def hold_out(self, conversations: list[int]) -> None:
        """From now on, exclude every conversation with the same tokens as one of these."""
        self.held_out_digests = {self.digests[item] for item in conversations}

    def conversations(self, row: Row) -> list[int]:
        """The conversations of an encoded row that can be trained on; several if it was split.

        Rows that differ only beyond `max_length` have the same tokens: those of a held-out
        conversation are excluded.
        """
        index, position = row
        items = self.items[index][position]
        if self.held_out_digests.isdisjoint(self.digests[item] for item in items):
            return items
        self.sources[index].excluded[position] = "the same tokens as a held-out conversation"
        return [item for item in items if self.digests[item] not in self.held_out_digests]

    def count(self, row: Row) -> int:
        """How many conversations a row becomes; 1 as long as not every row is encoded."""
        return len(self.conversations(row)) if self.all_rows else 1

    def dataset(self) -> datasets.Dataset:
        """Every conversation encoded so far, with `input_ids`, `labels` and `length`."""
        return datasets.concatenate_datasets(self.parts)

    def audit(self, index: int) -> dict[str, Any]:
        """What became of a source's rows."""
        source, items = self.sources[index], self.items[index]
        encoded = [item for row in items.values() for item in row]
        return audit_source(
            str(source.source),
            read=len(source.indices),
            kept=len(source.kept),
            lengths=[self.lengths[item] for item in encoded],
            trained_tokens=sum(self.trained[item] for item in encoded),
            reasons=Counter(source.refused.values()),
            excluded=Counter(source.excluded.values()),
            truncated=sum(self.truncated[item] for item in encoded),
            split=sum(len(row) > 1 for row in items.values()),
            duplicates=source.duplicates,
            unused=source.unused,
            left_out=self.left_out[index],
        )


def _table(indices: list[int], encoded: list[Encoded], reasons: list[str]) -> pa.Table:
    """Encoded conversations as `FEATURES`, without a Python object per token."""
    lengths = np.array([len(one.ids) for one in encoded], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    ids, trained = (
        np.concatenate([getattr(one, name) for one in encoded]) for name in ("ids", "trained")
    )
    labels = Encoded(ids, trained).labels
    return pa.table(
        {
            ROW_COLUMN: pa.array(indices, pa.int64()),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
            "length": pa.array(lengths),
            "trained": pa.array([int(one.trained.sum()) for one in encoded], pa.int32()),
            "truncated": pa.array([one.truncated for one in encoded], pa.bool_()),
            "digest": pa.array([_tokens_digest(one.ids) for one in encoded], pa.string()),
            "refused": pa.array(reasons, pa.string()),
            "left_out": pa.array([one.left_out for one in encoded], pa.string()),
        }
    )


def _tokens_digest(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def model_positions(stage: Stage) -> int | None:
    """The context length of the model a stage starts from, if its config can be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            stage.model_name_or_path,
            revision=stage.revision,
            trust_remote_code=stage.trust_remote_code,
        )
    except NOT_LOADED:
        return None  # loading the model will report it
    return getattr(config, "max_position_embeddings", None)
