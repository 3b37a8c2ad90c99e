"""Real models with hand-set weights, whose scores are therefore known."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save a model with its tokenizer and return the folder as text."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def always_follow(model: Any, successors: dict[int, int], other: int) -> Any:
    """Make the next token depend on the last one alone: layers add nothing, embeddings are one-hot.

    Args:
        model: its `hidden_size` equals its `vocab_size`; head and embedding are not tied.
        successors: token → the next token.
        other: the next token after all others.
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
    """Each token of a text → the next; a token must not have two different successors."""
    successors: dict[int, int] = {}
    for token, following in pairwise(tokens):
        assert successors.setdefault(token, following) == following, "a token comes twice"
    return successors


def rigged_to_say(text: str, make_model: Any, tokenizer: Any, folder: Path) -> str:
    """A model that answers every prompt with the same text."""
    size = {"vocab_size": len(tokenizer), "hidden_size": len(tokenizer), "num_hidden_layers": 1}
    model = make_model("llama", **size, tie_word_embeddings=False)
    start = tokenizer.convert_tokens_to_ids("<|assistant_start|>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return save(always_follow(model, chain([start, *ids, end]), end), tokenizer, folder / "rigged")
