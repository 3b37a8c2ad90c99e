"""Rows of at most so many tokens: documents and conversations laid into them best-fit."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

import torch

from hfsft.tokens.encoding import IGNORED


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Lay items into as few bins as best-fit decreasing finds.

    Args:
        lengths: tokens of each item, each at most `capacity`.
        capacity: tokens a bin.

    Returns:
        Bins of item positions, fullest placement first (Johnson 1973, best-fit decreasing).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free tokens and -position of each bin: the latest first
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[item],))
        if place == len(rooms):
            bins.append([])
            free, index = capacity, 1 - len(bins)
        else:
            free, index = rooms.pop(place)
        bins[-index].append(item)
        insort(rooms, (free - lengths[item], index))
    return bins


def tightest_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The bins of `best_fit`, as many of them, but of the smallest size that they all fit.

    Args:
        lengths: tokens of each item, each at most `capacity`.
        capacity: tokens a bin at most.

    Returns:
        Bins of item positions, evenly filled: 9.3 rows' worth of tokens in 10 rows of 0.93.
    """
    bins = best_fit(lengths, capacity)
    low, high = max(max(lengths), -(-sum(lengths) // len(bins))), capacity
    while low < high:
        middle = (low + high) // 2
        tighter = best_fit(lengths, middle)
        if len(tighter) <= len(bins):
            bins, high = tighter, middle
        else:
            low = middle + 1
    return bins


def fit_rows(documents: Iterable[list[int]], bos: int, length: int) -> list[list[int]]:
    """Lay documents into rows, each behind a `bos`; one that fits a row is never cut.

    A longer document becomes full rows and a rest; rests and short documents are laid best-fit.

    Args:
        documents: token ids of each.
        bos: the token that begins a row and a document.
        length: tokens a row.

    Returns:
        Rows of at most `length` token ids; no token is dropped.
    """
    rows, pieces = [], []
    for ids in documents:
        for start in range(0, max(len(ids), 1), length - 1):
            piece = [bos, *ids[start : start + length - 1]]
            (rows if len(piece) == length else pieces).append(piece)
    for items in best_fit([len(piece) for piece in pieces], length):
        rows.append([token for item in items for token in pieces[item]])
    return rows


class PackedConversations(torch.utils.data.Dataset):
    """Whole conversations in rows of at most `length` tokens, each attending to itself alone."""

    origins: Any  # `mixture.Origins` of the conversations, where they come from a recipe

    def __init__(self, conversations: Any, length: int, order: list[int], window: int = 1000):
        """Choose the rows.

        Args:
            conversations: a dataset of `input_ids` and `labels`.
            length: tokens a row.
            order: the conversations' positions in the order they are laid.
            window: conversations that are fitted together; more fills rows better, by ever less.
        """
        self.conversations = conversations
        lengths = conversations["length"][:]
        self.rows = [
            [order[start + item] for item in items]
            for start in range(0, len(order), window)
            for items in best_fit([lengths[i] for i in order[start : start + window]], length)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for item in self.rows[row]:
            conversation = self.conversations[item]
            ids += conversation["input_ids"]
            # its first token would be predicted from the conversation before it
            labels += [IGNORED, *conversation["labels"][1:]]
            positions += range(len(conversation["input_ids"]))
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class StepCollator:
    """Lay the examples of one optimizer step into rows.

    Conversations are laid best-fit, whole, into as few rows of at most `max_length` tokens as they
    fit, and those as short as they can be. What comes with `position_ids` (mid) or without labels
    (base) is a row already.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None, alone: bool = False):
        """Set it up.

        Args:
            pad_token_id: fills rows up; never trained on, and a document of its own.
            max_length: tokens a row; None: those of the step's longest conversation.
            alone: one conversation a row, for a model that cannot keep several apart.
        """
        self.pad_token_id, self.max_length, self.alone = pad_token_id, max_length, alone

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Lay them.

        Args:
            examples: `input_ids`, and `labels` unless every token is trained on.

        Returns:
            int64 `input_ids`, `labels` and `position_ids` of shape [rows, max_length], the fullest
            rows first. `position_ids` begin at 0 in each document, padding is one too. Where the
            examples have a `number` (validation's), each token's `numbers` as well.
        """
        documents = [_document(example) for example in examples]
        capacity = self.max_length or max(len(ids) for ids, _, _ in documents)
        if self.alone or "position_ids" in examples[0] or "labels" not in examples[0]:
            bins = [[item] for item in range(len(documents))]
        else:
            bins = tightest_fit([len(ids) for ids, _, _ in documents], capacity)
        bins.sort(key=lambda items: -sum(len(documents[item][0]) for item in items))
        rows = [
            tuple([token for item in items for token in documents[item][part]] for part in range(3))
            for items in bins
        ]
        width = capacity
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id),
            "labels": torch.full((len(rows), width), IGNORED),
            "position_ids": torch.zeros((len(rows), width), dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            length = len(row[0])
            for tensor, values in zip(batch.values(), row, strict=True):
                tensor[index, :length] = torch.tensor(values)
            batch["position_ids"][index, length:] = torch.arange(width - length)
        if "number" in examples[0]:
            batch["numbers"] = torch.zeros((len(rows), width), dtype=torch.int64)
            for index, items in enumerate(bins):
                numbers = [examples[item]["number"] for item in items for _ in documents[item][0]]
                batch["numbers"][index, : len(numbers)] = torch.tensor(numbers)
        return batch


def _document(example: dict[str, list[int]]) -> tuple[list[int], list[int], Any]:
    ids = example["input_ids"]
    labels = example.get("labels", ids)
    # its first token would be predicted from the document before it
    return ids, [IGNORED, *labels[1:]], example.get("position_ids", range(len(ids)))


def micro_batches(step: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Cut a step into micro-batches, each no wider than what its longest row needs.

    Args:
        step: as `StepCollator` makes it, on the CPU.
        rows: a micro-batch's; 0: each document by itself.

    Returns:
        For each `input_ids`, `labels` and `position_ids` of shape [rows, longest].
    """
    if rows == 0:
        return _single_documents(step)
    parts = []
    for start in range(0, len(step["input_ids"]), rows):
        part = {name: tensor[start : start + rows] for name, tensor in step.items()}
        parts.append({name: tensor[:, : _width(part)] for name, tensor in part.items()})
    return parts


def _single_documents(step: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    parts = []
    for row in range(len(step["input_ids"])):
        starts = (step["position_ids"][row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            part = {name: tensor[row : row + 1, start:end] for name, tensor in step.items()}
            if (part["labels"] != IGNORED).any():  # padding has none
                parts.append(part)
    return parts


def _width(part: dict[str, torch.Tensor]) -> int:
    """The longest row up to the padding that the step's longest row asked for.

    Padding is a document of its own, behind the last 0 of `position_ids`, and none of it is trained
    on. So what follows the last trained token of every row is needed by no loss.
    """
    trained = (part["labels"] != IGNORED).any(0).nonzero()
    return int(trained[-1]) + 1 if len(trained) else 1


def model_inputs(part: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A micro-batch as the patched forward takes it (see `fuse_head`), without an attention mask.

    Args:
        part: one of `micro_batches`, on the CPU.

    Returns:
        `input_ids` and `position_ids` [rows, longest]; `targets` and `target_positions` [trained
        tokens]; `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [documents + 1]) and `max_length_q`,
        `max_length_k`, by transformers' names.
    """
    labels, positions = part["labels"], part["position_ids"]
    trained = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    starts = (positions.flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([positions.numel()])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {
        "input_ids": part["input_ids"],
        "position_ids": positions,
        "targets": labels[:, 1:][trained],
        "target_positions": trained[0] * labels.shape[1] + trained[1],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
