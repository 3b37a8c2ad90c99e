"""The held-out set: sampled to a budget, its metrics, and greedy answers."""

import hashlib
import math
import random
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from hfsft.data.sources import SOURCE_COLUMN
from hfsft.evaluation.answering import generate_greedily
from hfsft.plan.sizes import steps_of
from hfsft.recipe.schema import Stage
from hfsft.tokens.encoding import IGNORED
from hfsft.train.advice import Validation

FEWEST = 16  # documents, whatever the budget: the mean over fewer is too noisy


ANSWER_TOKENS = 48  # of an answer to a sample prompt at most


class HeldOut(torch.utils.data.Dataset):
    """Held-out documents, each with its number: conversations, or rows of base text."""

    def __init__(self, rows: Any, indices: list[int] | None = None):
        """Set it up.

        Args:
            rows: a dataset of `input_ids`, `labels` unless all is trained on, and `source`.
            indices: of the rows to validate on; None: all.
        """
        self.rows = rows
        self.indices = list(range(len(rows))) if indices is None else indices
        self.sources = rows[SOURCE_COLUMN][:]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = dict(self.rows[self.indices[number]])
        del row[SOURCE_COLUMN]
        return row | {"number": number}

    def sample(self, count: int, seed: int) -> "HeldOut":
        """A seeded sample of `count` of all rows, in their order."""
        chosen = random.Random(f"{seed}:eval_budget").sample(range(len(self.rows)), count)
        return HeldOut(self.rows, sorted(chosen))

    @cached_property
    def digest(self) -> str:
        """Of all documents' tokens and labels: equal for the same documents in the same order."""
        found = hashlib.blake2b(digest_size=16)
        for row in self:
            for ids in (row["input_ids"], row.get("labels", ())):
                found.update(np.array([len(ids), *ids], np.int64).tobytes())
        return found.hexdigest()

    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(row["input_ids"]) for row in self)

    def text_bytes(self, tokenizer: Any) -> int:
        """Bytes (UTF-8) of the text that is predicted, without special tokens."""
        total = 0
        for row in self:
            labels = row.get("labels", row["input_ids"])[1:]
            ids = [token for token in labels if token != IGNORED]
            total += len(tokenizer.decode(ids, skip_special_tokens=True).encode())
        return total

    def by_source(self) -> dict[str, list[int]]:
        """The numbers of the documents of each source, under its short name."""
        full = [self.sources[index] for index in self.indices]
        short = {name: _short_name(name) for name in full}
        if len(set(short.values())) < len(short):
            short = {name: name for name in full}
        found: dict[str, list[int]] = {}
        for number, name in enumerate(full):
            found.setdefault(short[name], []).append(number)
        return found


def _short_name(source: str) -> str:
    """`HuggingFaceTB/smol-smoltalk` → smol-smoltalk, `chats/mine.jsonl.gz` → mine."""
    name = PurePath(source).name
    return name.split(".json")[0].split(".csv")[0].split(".parquet")[0].split(".txt")[0] or name


def evaluations(args: TrainingArguments) -> int:
    """How many validations a stage has: before, during and after training."""
    if args.eval_strategy != "steps":
        return 2
    return 1 + math.ceil(args.max_steps / steps_of(args.eval_steps, args.max_steps))


def documents_within(
    budget: float, held_out: HeldOut, stage: Stage, args: TrainingArguments, train_tokens: int
) -> int:
    """How many held-out documents can be validated on within a share of the stage's time.

    In tokens, not seconds: a run that is interrupted and resumed must choose the same documents.
    A validated token costs one forward pass; a trained token also a backward pass of twice that
    (once, where weights are frozen), and with activation checkpointing a second forward pass.

    Args:
        budget: the share, above 0.
        held_out: all that is held out.
        stage: whose.
        args: its trainer's, for the number of evaluations.
        train_tokens: of the whole stage.

    Returns:
        At most all, at least `FEWEST` of them.
    """
    if budget >= 1:
        return len(held_out)
    forwards = 2 if stage.lora is not None else 3
    forwards += args.activation_checkpointing
    allowed = budget / (1 - budget) * train_tokens * forwards / evaluations(args)
    return min(len(held_out), max(FEWEST, int(allowed * len(held_out) / held_out.tokens())))


def validation_metrics(
    prefix: str, held_out: HeldOut, totals: torch.Tensor, text_bytes: int | None
) -> dict[str, float]:
    """The metrics of a validation.

    Args:
        prefix: of the metrics' names.
        held_out: what was validated on.
        totals: float64 [4, documents]: losses in nats, predicted tokens, top-1 predictions among
            them, and losses of text without special tokens.
        text_bytes: of all text; None: leave out bits per byte.

    Returns:
        Mean loss per token, its standard error over documents, accuracy, the loss of each source
        if there are several, and bits per byte.
    """
    losses, tokens, correct, text_losses = totals.numpy()
    whole = Validation(0, losses, tokens)
    metrics = {
        f"{prefix}_loss": whole.loss,
        f"{prefix}_mean_token_accuracy": correct.sum() / max(tokens.sum(), 1),
    }
    if len(held_out) > 1:
        metrics[f"{prefix}_loss_error"] = whole.error
    sources = held_out.by_source()
    if len(sources) > 1:
        for name, numbers in sources.items():
            one = Validation(0, losses[numbers], tokens[numbers])
            metrics[f"{prefix}_{name}_loss"] = one.loss
    if text_bytes:
        metrics[f"{prefix}_bits_per_byte"] = text_losses.sum() / math.log(2) / text_bytes
    return {name: float(value) for name, value in metrics.items()}


def losses_of(totals: torch.Tensor) -> dict[str, list[float]]:
    """A line of `validation.jsonl`: each document's summed loss in nats, and predicted tokens.

    Args:
        totals: as `validation_metrics` takes them.
    """
    return {"losses": totals[0].tolist(), "tokens": totals[1].long().tolist()}


def greedy_answers(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int = ANSWER_TOKENS
) -> list[str]:
    """Greedy completions of some prompts, in one batch.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its own.
        prompts: token ids.
        max_new_tokens: of each completion at most.

    Returns:
        The completions, without special tokens. No random number is drawn.
    """
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(
        model.device
    )
    output = generate_greedily(
        model,
        inputs,
        tokenizer.pad_token_id,
        model.generation_config.eos_token_id,
        max_new_tokens=max_new_tokens,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


@contextmanager
def attention_of(model: Any, name: str) -> Any:
    """Use another attention implementation within a `with` block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
