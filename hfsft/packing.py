"""Rows of at most so many tokens: documents and conversations laid into them best-fit."""

from collections.abc import Iterable
from typing import Any

import torch

from hfsft.conversations import IGNORED


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Lay items into as few bins as best-fit decreasing finds.

    Args:
        lengths: tokens of each item, each at most `capacity`.
        capacity: tokens a bin.

    Returns:
        Bins of item positions, fullest placement first (Johnson 1973, best-fit decreasing).
    """
    bins: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens → open bins
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        free = next((size for size in range(length, capacity + 1) if room[size]), None)
        if free is None:
            bins.append([item])
            free, index = capacity, len(bins) - 1
        else:
            index = room[free].pop()
            bins[index].append(item)
        room[free - length].append(index)
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


class RowCollator:
    """Batch rows for a causal language model, without an attention mask.

    transformers keeps packed documents apart only if `position_ids` restart and no mask is given.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad to the longest row.

        Args:
            rows: with `input_ids`, and for packed conversations `labels` and `position_ids`.

        Returns:
            int64 tensors of shape [rows, longest]; padding is a document of its own, untrained.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        if "position_ids" in rows[0]:
            batch["position_ids"] = []
        for row in rows:
            ids = row["input_ids"]
            padding = longest - len(ids)
            batch["input_ids"].append([*ids, *[self.pad_token_id] * padding])
            batch["labels"].append([*row.get("labels", ids), *[IGNORED] * padding])
            if "position_ids" in row:
                batch["position_ids"].append([*row["position_ids"], *range(padding)])
        return {key: torch.tensor(values) for key, values in batch.items()}
