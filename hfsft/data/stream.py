"""Base text encoded while it streams from the Hub, and resumable at any row.

`TextStream` is the training set; `take_block`, `is_text` and `require_column` are shared with the
cached path in `text.py`.
"""

import copy
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import torch

from hfsft.data.packing import fit_rows
from hfsft.data.sources import ROW_COLUMN, SOURCE_COLUMN, has_gap, read_hub
from hfsft.errors import DataError
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.encoding import document_start, encode_texts

# documents are encoded and packed in blocks of at most
BLOCK = 2048  # documents and
BLOCK_CHARACTERS = 16_000_000  # characters, whose tokens take 250 MB


# --- documents ---


def is_text(text: Any) -> bool:
    """Whether a value is text that is not blank, and that a tokenizer can encode."""
    try:
        return isinstance(text, str) and bool(text.strip() and text.encode()) and not has_gap(text)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def require_column(source: Source, names: list[str]) -> None:
    """Check that a source has its text column.

    Args:
        source: names the column, or it is `text`.
        names: the columns it has.

    Raises:
        DataError: if it is missing.
    """
    column = source.columns.get("text", "text")
    if column not in names:
        others = ", ".join(name for name in names if name != ROW_COLUMN)
        raise DataError(
            f"{source}: has no column '{column}', only {others}; name its text column with "
            "`columns: {text: YOUR_COLUMN}`"
        )


def take_block(texts: Iterator[str], size: int) -> list[str]:
    """The next `size` texts, or fewer if they reach `BLOCK_CHARACTERS`, which bounds memory."""
    block, characters = [], 0
    while len(block) < size and characters < BLOCK_CHARACTERS:
        text = next(texts, None)
        if text is None:
            break
        block.append(text)
        characters += len(text)
    return block


# --- streams ---


def open_stream(source: Source) -> datasets.IterableDataset:
    """Open a dataset on the Hub to be read while training.

    Raises:
        DataError: if the source is local, cannot be opened, or lacks its text column.
    """
    if os.path.exists(os.path.expanduser(source.path)):
        raise DataError(f"{source}: streaming is for datasets on the Hub; remove `streaming`")
    stream = read_hub(source, streaming=True)
    if stream.column_names is not None:
        require_column(source, stream.column_names)
    return stream


def stream_texts(stream: Iterable[dict[str, Any]], source: Source) -> Iterator[str]:
    """The texts of a stream's rows, without blank and invalid ones."""
    column = source.columns.get("text", "text")
    return (row[column] for row in stream if is_text(row.get(column)))


def open_text_stream(
    stage: Stage, stream: datasets.IterableDataset, tokenizer: Any, length: int
) -> tuple["TextStream", Any]:
    """Split a stream into a training set and its first documents, which are held out.

    Args:
        stage: says how many documents to hold out.
        stream: as `open_stream` returns it.
        tokenizer: encodes the documents.
        length: tokens per row.

    Returns:
        The training set, and rows held out or None.

    Raises:
        DataError: if `held_out` is a share, or the first documents have no text.
    """
    source = stage.data[0]
    if not stage.validates:
        return TextStream(stream, source, tokenizer, length, stage.seed, set()), None
    if stage.held_out < 1:
        raise DataError(
            f"{stage.name}.held_out: {stage.held_out} is a share, but a stream's length is not "
            "known; give a number of documents"
        )
    count = int(stage.held_out)
    texts = list(stream_texts(stream.take(count), source))
    if not texts:
        raise DataError(f"{stage.name}: held_out: the first {count} documents have no text")
    rows = fit_rows(encode_texts(texts, tokenizer), document_start(tokenizer), length)
    train = TextStream(stream.skip(count), source, tokenizer, length, stage.seed, set(texts))
    held_out = {"input_ids": rows, SOURCE_COLUMN: [str(source)] * len(rows)}
    return train, datasets.Dataset.from_dict(held_out)


class TextStream(torch.utils.data.IterableDataset):
    """Rows of a streaming source, encoded while it is read, epoch after epoch without end.

    Documents are read in blocks. While one block is trained on, the next is shuffled, encoded and
    packed into rows. A block depends only on the seed, the epoch and its number: to resume at a
    row, one block is prepared again and nothing before it is read.
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
        """Set up; nothing is read yet.

        Args:
            stream: rows of documents.
            source: names the text column.
            tokenizer: encodes them.
            length: tokens per row.
            seed: of the order within a block.
            held_out: documents to leave out wherever they occur.
            block: documents per block.
        """
        self.stream, self.source, self.tokenizer = stream, source, tokenizer
        self.length, self.seed, self.held_out, self.block = length, seed, held_out, block
        self.beginning = copy.deepcopy(stream.state_dict())
        self.start = {"epoch": 0, "block": 0, "stream": self.beginning}
        # rows to skip in the first block, and rows of the blocks before it
        self.skip = self.given = 0
        # of each block that may still be trained on: the rows before it, and its position
        self.marks: deque[tuple[int, dict[str, Any]]] = deque()

    def state_after(self, rows: int) -> dict[str, Any]:
        """The state with which `resume` continues after the first `rows` rows."""
        while len(self.marks) > 1 and self.marks[1][0] <= rows:
            self.marks.popleft()
        before, position = self.marks[0]
        return {"position": position, "skip": rows - before, "given": rows}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue after the row that `state_after` was called with."""
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
        """Each block's position and rows, from `start` on."""
        epoch, number, state = self.start["epoch"], self.start["block"], self.start["stream"]
        while True:
            self.stream.load_state_dict(copy.deepcopy(state))
            texts = stream_texts(iter(self.stream), self.source)
            while block := take_block(texts, self.block):
                position = {"epoch": epoch, "block": number, "stream": state}
                # taken after the block, as a loaded stream has no state before its first row
                state = copy.deepcopy(self.stream.state_dict())
                block = [text for text in block if text not in self.held_out]
                yield position, self._rows(block, epoch, number)
                number += 1
            if number == 0:
                raise DataError(f"{self.source}: has no text except what is held out")
            epoch, number, state = epoch + 1, 0, self.beginning

    def _rows(self, texts: list[str], epoch: int, number: int) -> list[list[int]]:
        """A block's documents, shuffled, encoded and packed."""
        order = random.Random(f"{self.seed}:{epoch}:{number}")
        order.shuffle(texts)
        ids = encode_texts(texts, self.tokenizer)
        rows = fit_rows(ids, document_start(self.tokenizer), self.length)
        order.shuffle(rows)
        return rows
