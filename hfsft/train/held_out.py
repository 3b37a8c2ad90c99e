"""Validation: what is held out, cut to a budget; what its losses say; what the model answers."""

import math
import random
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import torch
from transformers import TrainingArguments

from hfsft.data.sources import SOURCE_COLUMN
from hfsft.evaluation.answering import generate_greedily
from hfsft.recipe.schema import Stage
from hfsft.tokens.encoding import IGNORED
from hfsft.train.advice import Validation

FEWEST = 16  # documents that the budget leaves in any case: fewer say next to nothing


ANSWER_TOKENS = 48  # of an answer to a sample prompt at most


class HeldOut(torch.utils.data.Dataset):
    """Held-out documents, each with its number: conversations, or rows of base text."""

    def __init__(self, rows: Any, places: list[int] | None = None):
        """Set it up.

        Args:
            rows: a dataset of `input_ids`, `labels` unless all is trained on, and `source`.
            places: those of the rows that are validated on; None: all.
        """
        self.rows = rows
        self.places = list(range(len(rows))) if places is None else places
        self.sources = rows[SOURCE_COLUMN][:]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = dict(self.rows[self.places[number]])
        del row[SOURCE_COLUMN]
        return row | {"number": number}

    def cut(self, count: int, seed: int) -> "HeldOut":
        """A seeded sample of so many of its rows, in their order."""
        chosen = random.Random(f"{seed}:eval_budget").sample(range(len(self.rows)), count)
        return HeldOut(self.rows, sorted(chosen))

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
        full = [self.sources[place] for place in self.places]
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
    """How often a stage is validated: before, during and after."""
    if args.eval_strategy != "steps":
        return 2
    every = args.eval_steps
    every = math.ceil(every * args.max_steps) if every < 1 else int(every)
    return 1 + math.ceil(args.max_steps / every)


def documents_within(
    budget: float, held_out: HeldOut, stage: Stage, args: TrainingArguments, train_tokens: int
) -> int:
    """How many held-out documents can be validated on within a share of the stage's time.

    It counts tokens, not seconds: a run that is broken off and goes on must come to the same ones.
    A validated token costs a forward, a trained one a backward of twice that too, without the
    gradients of frozen weights half of it, and with checkpointing a second forward.

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
    """What a validation says.

    Args:
        prefix: of the metrics' names.
        held_out: what was validated on.
        totals: float64 [4, documents]: losses in nats, predicted tokens, likeliest ones among
            them, and losses of text without special tokens.
        text_bytes: of all text; None: bits per byte are not asked for.

    Returns:
        Mean loss a token, its standard error over documents, accuracy, the loss of each source
        if there are several, and bits per byte.
    """
    losses, tokens, hits, text_losses = totals.numpy()
    whole = Validation(0, losses, tokens)
    metrics = {
        f"{prefix}_loss": whole.loss,
        f"{prefix}_mean_token_accuracy": hits.sum() / max(tokens.sum(), 1),
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


def greedy_answers(
    model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int = ANSWER_TOKENS
) -> list[str]:
    """How a model goes on with each of some texts, always with the likeliest token.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its own.
        texts: as the model is to see them, special tokens written out.
        max_new_tokens: of each answer at most.

    Returns:
        The answers, without special tokens. No random number is drawn.
    """
    inputs = tokenizer(
        texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(model.device)
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
    """A model with another attention for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
