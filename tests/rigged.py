"""Real models whose weights are set by hand, so that what they must score is known."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save a model with its tokenizer; returns the folder as text."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def always_follow(model: Any, successors: dict[int, int], other: int) -> Any:
    """Have the last token alone say what follows: layers add nothing, each word has its own axis.

    Args:
        model: its `hidden_size` is its `vocab_size`, its head and embedding are two.
        successors: token → the one that follows it.
        other: follows all others.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")):
            parameter.zero_()
    size = model.config.vocab_size
    model.get_input_embeddings().weight.copy_(torch.eye(size))
    head = torch.zeros(size, size)
    for token in range(size):
        head[successors.get(token, other), token] = 1.0
    model.get_output_embeddings().weight.copy_(head)
    return model


def chain(tokens: list[int]) -> dict[int, int]:
    """Each token of a text → the next; none may come twice with different successors."""
    successors: dict[int, int] = {}
    for token, following in pairwise(tokens):
        assert successors.setdefault(token, following) == following, "a token comes twice"
    return successors
