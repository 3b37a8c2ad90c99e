"""relu² without the float32 copies that autocast makes of it on CUDA."""

from typing import Any

import torch
from transformers.activations import ReLUSquaredActivation


class SquaredReLU(torch.nn.Module):
    """relu² in the precision of its input.

    CUDA's autocast squares in float32, and keeps the cast input and the product for backward:
    1.07 GB for 8 layers of 2,048 and 16,384 tokens. The product of two half-precision numbers is
    rounded to half precision either way, so values and gradients are the same bits.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The square of the positive part of `hidden`, of any shape."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.relu(hidden).square()


def square_in_half(model: Any) -> None:
    """Replace the model's relu² modules by `SquaredReLU`, in place.

    Args:
        model: a `PreTrainedModel`.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ReLUSquaredActivation):
                setattr(module, name, SquaredReLU())
