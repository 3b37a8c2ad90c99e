"""Conversations encoded as a run asks for them."""

import hashlib
from collections import Counter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hfsft.data.audit import audit_source
from hfsft.data.cache import mapped
from hfsft.data.rows import CheckedSource, Row, rows_of_batch
from hfsft.data.sources import ROW_COLUMN, renamed
from hfsft.errors import DataError
from hfsft.recipe.schema import Stage
from hfsft.tokens.encoding import Encoded, TooLong, fit_conversations
from hfsft.tokens.formats import BadRow, to_messages


class Prepared:
    """A stage's conversations, encoded as they are asked for."""

    def __init__(self, stage: Stage, tokenizer: Any, sources: list[CheckedSource]):
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

    def _encode(self, source: CheckedSource, rows: list[int]) -> datasets.Dataset:
        # the function goes to other processes: it holds no more than it needs
        stage, tokenizer, positions = self.stage, self.tokenizer, self.positions
        name, row_format = source.source, source.row_format

        def encode(batch: dict[str, list[Any]]) -> pa.Table:
            found = fit_conversations(
                [to_messages(renamed(row, name), row_format) for row in rows_of_batch(batch)],
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
        return mapped(selected, encode, ENCODED, repr(key), stage, f"{name}: encode")

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
