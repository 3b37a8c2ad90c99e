"""Rows of one model that advance a token at a time; rows join and leave between steps."""

import inspect
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache


class Batch:
    """The key-value cache of several answers, padded on the left to the longest.

    A prompt is always computed by itself, as `generate` computes it for one prompt, so only the
    steps after it depend on the rows beside it, by rounding.
    """

    def __init__(self, model: Any):
        """Start without a row.

        Args:
            model: a causal language model in evaluation mode.
        """
        self.model = model
        self.lengths: list[int] = []  # tokens in the cache, row by row, without padding
        self.cache = DynamicCache()
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def join(self, prompts: list[list[int]]) -> torch.Tensor:
        """Add a row for each prompt.

        Args:
            prompts: token ids, at least one each.

        Returns:
            The logits of the token after each prompt; [prompts, vocabulary].
        """
        caches, logits = [DynamicCache() for _ in prompts], []
        for prompt, cache in zip(prompts, caches, strict=True):
            logits.append(self._forward([prompt], cache))
        held = [self.cache] if self.lengths else []
        self.lengths += map(len, prompts)
        self.cache = _side_by_side([*held, *caches])
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> torch.Tensor:
        """Append a token to each row.

        Args:
            tokens: one per row.

        Returns:
            The logits of each row's next token; [rows, vocabulary].
        """
        device = self.model.device
        width = self.cache.get_seq_length() + 1
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        settings = {}
        if min(self.lengths) < width - 1:
            from_end = width - torch.arange(width, device=device)  # 1 at the last position
            settings["attention_mask"] = (from_end <= lengths + 1).long()
        if self.takes_positions:
            settings["position_ids"] = lengths
        logits = self._forward([[token] for token in tokens], self.cache, **settings)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the padding that none of the rest needs."""
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self.cache = DynamicCache()
            return
        index = torch.tensor(rows, device=self.model.device)
        longest = max(self.lengths)
        for layer in self.cache.layers:  # a new cache would copy them once more
            layer.keys = layer.keys[:, :, -longest:].index_select(0, index)
            layer.values = layer.values[:, :, -longest:].index_select(0, index)

    @torch.inference_mode()
    def alone(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """The logits after a prompt and a part of its answer, from a batch of one; [vocabulary].

        They are those of `generate` for this prompt, bit by bit.
        """
        cache = DynamicCache()
        logits = self._forward([prompt], cache)
        for token in tokens:
            logits = self._forward([[token]], cache)
        return logits[0]

    def bytes_per_token(self) -> float:
        """Memory of a position of a row; the batch has at least one row."""
        layers = self.cache.layers
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return held / (layers[0].keys.shape[0] * layers[0].keys.shape[2])

    def _forward(self, ids: list[list[int]], cache: DynamicCache, **settings: Any) -> torch.Tensor:
        """The logits of each row's next token, in float32; [rows, vocabulary]."""
        output = self.model(
            input_ids=torch.tensor(ids, device=self.model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **settings,
        )
        return output.logits[:, -1].float()


def _side_by_side(caches: list[DynamicCache]) -> DynamicCache:
    """The first of some caches with the rows of all, padded on the left to the longest."""
    if len(caches) == 1:
        return caches[0]
    width = max(cache.get_seq_length() for cache in caches)

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])

    for index, layer in enumerate(caches[0].layers):
        same = [cache.layers[index] for cache in caches]
        layer.keys = joined([one.keys for one in same])
        layer.values = joined([one.values for one in same])
    return caches[0]
