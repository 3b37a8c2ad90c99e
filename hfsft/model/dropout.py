"""Dropout by token: what is dropped does not depend on how a step is dealt to ranks or cut up.

torch draws a mask in the order of a tensor's elements. Another number of ranks, or smaller
micro-batches after memory ran out, would change all of them, and so the run.
"""

import hashlib
from typing import Any

import torch
from torch import nn

MASKS = 4096  # drawn for each width in a step; in each module a token takes one of them
FACTORS = (-4658895280553007687, -7723592293110705685)  # of splitmix64 (Steele et al. 2014)


class TokenMasks:
    """The masks of a step, and the key by which each token of a micro-batch chooses among them."""

    def __init__(self) -> None:
        self.seed = 0
        self.keys: torch.Tensor | None = None  # int64 [rows, longest]
        self.drawn: dict[tuple[int, float], torch.Tensor] = {}

    def begin_step(self, seed: int) -> None:
        """Forget the masks of the step before.

        Args:
            seed: of this step, the same on every rank.
        """
        self.seed, self.drawn = seed, {}

    def begin_micro_batch(self, part: dict[str, torch.Tensor], device: torch.device) -> None:
        """Derive the tokens' keys: hashes of a document's tokens up to each.

        Args:
            part: `input_ids` and `position_ids` [rows, longest], which start at 0 in a document.
            device: where the model is.
        """
        positions = part["position_ids"]
        # 40 bits: their sum over a row stays within an int64
        values = _mixed(part["input_ids"] * 2**24 + positions) & (2**40 - 1)
        sums = values.cumsum(1)
        starts = torch.arange(positions.shape[1]) - positions
        keys = _mixed(sums - (sums - values).gather(1, starts))
        if device.type == "cuda":  # a copy from pageable memory would wait for the GPU
            keys = keys.pin_memory()
        self.keys = keys.to(device, non_blocking=True)

    def dropped(self, shape: torch.Size, p: float, salt: int) -> torch.Tensor | None:
        """Which elements a module drops.

        Args:
            shape: of its input.
            p: the share to drop.
            salt: odd, the module's own.

        Returns:
            bool of that shape; None if its elements are not features of the micro-batch's tokens.
        """
        keys = self.keys
        if keys is None or shape[:-1] not in (keys.shape, (keys.numel(),)):
            return None
        width = shape[-1]
        if (width, p) not in self.drawn:
            generator = torch.Generator(keys.device).manual_seed(self.seed)
            draw = torch.rand((MASKS, width), generator=generator, device=keys.device)
            self.drawn[width, p] = draw < p
        chosen = (keys.view(shape[:-1]) * salt >> 40) & (MASKS - 1)
        return self.drawn[width, p][chosen]


class TokenDropout(nn.Dropout):
    """`nn.Dropout` with the masks of `TokenMasks`, where the input has a vector for each token."""

    def __init__(self, p: float, name: str, masks: TokenMasks):
        """Set up.

        Args:
            p: the share of elements to drop.
            name: of this module in the model: two modules drop different features.
            masks: of the model.
        """
        super().__init__(p)
        digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
        self.masks, self.salt = masks, int.from_bytes(digest) | 1

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop elements in training, and scale the others by 1 / (1 - p)."""
        dropped = None
        if self.training and self.p < 1:
            dropped = self.masks.dropped(hidden.shape, self.p, self.salt)
        if dropped is None:
            return super().forward(hidden)
        return hidden.masked_fill(dropped, 0.0) * (1 / (1 - self.p))


def drop_by_token(model: Any) -> TokenMasks | None:
    """Replace a model's dropout modules, in place.

    Attention's dropout of its weights is no module, and stays as it is.

    Args:
        model: a `PreTrainedModel` or `PeftModel`.

    Returns:
        The masks to give each step and micro-batch; None if there is no dropout to replace.
    """
    masks, found = TokenMasks(), False
    for name, parent in list(model.named_modules()):
        for child, module in list(parent.named_children()):
            if type(module) is nn.Dropout and module.p > 0:
                new = TokenDropout(module.p, f"{name}.{child}", masks)
                setattr(parent, child, new.train(module.training))
                found = True
    return masks if found else None


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """A hash of each int64, whose products wrap."""
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        values = (values ^ (values >> shift)) * factor
    return values ^ (values >> 31)
