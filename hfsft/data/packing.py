"""Packing: documents and conversations into rows, a step's examples into micro-batches.

- `fit_rows` packs base text, `PackedConversations` packs mid's conversations, both ahead of time.
- `StepCollator` packs the examples of one optimizer step (sft); `micro_batches` splits the step,
  and `model_inputs` makes what the model's forward pass takes.

Each document of a row attends to itself alone: its `position_ids` start at 0.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hfsft.tokens.encoding import IGNORED

# --- bins ---


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing (Johnson 1973).

    Args:
        lengths: tokens of each item, each at most `capacity`.
        capacity: tokens per bin.

    Returns:
        Bins of item indices.
    """
    bins: list[list[int]] = []
    # free tokens and negated index of each bin, sorted: of equally full bins the latest comes first
    free_bins: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best = bisect_left(free_bins, (lengths[item],))
        if best == len(free_bins):
            bins.append([])
            free, index = capacity, 1 - len(bins)
        else:
            free, index = free_bins.pop(best)
        bins[-index].append(item)
        insort(free_bins, (free - lengths[item], index))
    return bins


def tightest_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack into as many bins as `best_fit`, but of the smallest capacity that suffices.

    Args:
        lengths: tokens of each item, each at most `capacity`.
        capacity: the most tokens per bin.

    Returns:
        Bins of item indices, evenly filled: 9.3 rows of tokens take 10 rows of 0.93 the width.
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


# --- rows packed ahead of time ---


def fit_rows(documents: Iterable[list[int]], first: int, length: int) -> list[list[int]]:
    """Pack documents into rows, a token before each; one that fits a row is never split.

    A longer document becomes full rows and a remainder; remainders and short documents are packed
    best-fit.

    Args:
        documents: token ids of each.
        first: the token that starts a row and a document, see `document_start`.
        length: tokens per row.

    Returns:
        Rows of at most `length` token ids; no token is dropped.
    """
    rows, segments = [], []
    for ids in documents:
        for start in range(0, max(len(ids), 1), length - 1):
            segment = [first, *ids[start : start + length - 1]]
            (rows if len(segment) == length else segments).append(segment)
    for items in best_fit([len(segment) for segment in segments], length):
        rows.append([token for item in items for token in segments[item]])
    return rows


class PackedConversations(torch.utils.data.Dataset):
    """Conversations packed into rows of at most `length` tokens, none of them split."""

    origins: Any  # the conversations' `Origins`, if they come from a recipe

    def __init__(self, conversations: Any, length: int, order: list[int], window: int = 1000):
        """Choose the rows.

        Args:
            conversations: a dataset of `input_ids`, `labels` and `length`.
            length: tokens per row.
            order: the conversations' indices in the order they are packed.
            window: conversations packed together; a larger one fills rows better, with
                diminishing returns.
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
            # its first token would be predicted from the previous conversation
            labels += [IGNORED, *conversation["labels"][1:]]
            positions += range(len(conversation["input_ids"]))
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


# --- a step ---


class StepCollator:
    """Pack the examples of one optimizer step into rows.

    Conversations are packed unsplit into as few rows of at most `max_length` tokens as best-fit
    finds, and into the shortest such rows. Examples with `position_ids` (mid) or without labels
    (base) are rows already.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None, alone: bool = False):
        """Set up.

        Args:
            pad_token_id: pads rows; never trained on, and a document of its own.
            max_length: tokens per row; None: those of the step's longest conversation.
            alone: one conversation per row, for a model that cannot separate packed ones.
        """
        self.pad_token_id, self.max_length, self.alone = pad_token_id, max_length, alone

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pack a step.

        Args:
            examples: `input_ids`, and `labels` unless every token is trained on.

        Returns:
            int64 `input_ids`, `labels` and `position_ids` of shape [rows, max_length], the fullest
            rows first. `position_ids` start at 0 in each document, and so in the padding. If the
            examples have a `number` (validation), `numbers` has that of each token's example.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        capacity = self.max_length or max(lengths)
        if self.alone or "position_ids" in examples[0] or "labels" not in examples[0]:
            bins = [[item] for item in range(len(examples))]
        else:
            bins = tightest_fit(lengths, capacity)
        bins.sort(key=lambda items: -sum(lengths[item] for item in items))
        shape = (len(bins), capacity)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
        }
        if "number" in examples[0]:
            batch["numbers"] = torch.zeros(shape, dtype=torch.int64)
        for row, items in enumerate(bins):
            end = 0
            for item in items:
                start, end = end, end + lengths[item]
                _place(
                    {name: values[row, start:end] for name, values in batch.items()}, examples[item]
                )
            batch["position_ids"][row, end:] = torch.arange(capacity - end)
        return batch


def _place(slots: dict[str, torch.Tensor], example: dict[str, Any]) -> None:
    """Write an example into its slice of a row."""
    ids = _integers(example["input_ids"])
    labels = _integers(example["labels"]) if "labels" in example else ids
    slots["input_ids"].copy_(ids)
    # the first token would be predicted from the previous document
    slots["labels"][1:].copy_(labels[1:])
    positions = example.get("position_ids")
    slots["position_ids"].copy_(
        torch.arange(len(ids)) if positions is None else _integers(positions)
    )
    if "numbers" in slots:
        slots["numbers"].fill_(example["number"])


def _integers(values: list[int]) -> torch.Tensor:
    """An int64 tensor, five times as fast as `torch.tensor`, which took most of packing a step."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def micro_batches(step: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Split a step into micro-batches, each only as wide as its longest row needs.

    Args:
        step: as `StepCollator` returns it, on the CPU.
        rows: per micro-batch; 0: one document per micro-batch, without packing.

    Returns:
        For each micro-batch `input_ids`, `labels` and `position_ids` of shape [rows, longest].
    """
    if rows == 0:
        return _single_documents(step)
    parts = []
    for start in range(0, len(step["input_ids"]), rows):
        part = {name: tensor[start : start + rows] for name, tensor in step.items()}
        parts.append({name: tensor[:, : _width(part)] for name, tensor in part.items()})
    return parts


def _single_documents(step: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A micro-batch for each document that has a trained token."""
    parts = []
    for row in range(len(step["input_ids"])):
        starts = (step["position_ids"][row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            part = {name: tensor[row : row + 1, start:end] for name, tensor in step.items()}
            if (part["labels"] != IGNORED).any():  # padding has no trained token
                parts.append(part)
    return parts


def _width(part: dict[str, torch.Tensor]) -> int:
    """The width up to the last trained token of any row.

    No loss depends on the tokens after it: a document's trailing untrained ones, and padding.
    """
    trained = (part["labels"] != IGNORED).any(0).nonzero()
    return int(trained[-1]) + 1 if len(trained) else 1


def model_inputs(part: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of the patched forward pass (see `fuse_head`), without an attention mask.

    Args:
        part: one of `micro_batches`, on the CPU.

    Returns:
        `input_ids` and `position_ids` [rows, longest]; `targets` and `target_positions` [trained
        tokens]; `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [documents + 1]) and `max_length_q`,
        `max_length_k`, as transformers names them.
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


def on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Inputs on their device, copied to a GPU without waiting for it.

    Args:
        inputs: tensors on the CPU; other values stay as they are.
        device: where the model is.
    """
    if device.type != "cuda":
        return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    # a copy from pageable memory would synchronise: seven times a micro-batch. A slice of a pinned
    # tensor counts as pinned, but is copied through pageable memory if it is not contiguous
    return {
        name: value.contiguous().pin_memory().to(device, non_blocking=True)
        if torch.is_tensor(value)
        else value
        for name, value in inputs.items()
    }
