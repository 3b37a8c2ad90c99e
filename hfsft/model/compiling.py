"""Compiled decoder layers: one graph for all layers and for every width of a micro-batch."""

from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

COMPILER_ADVICE = (
    "install a C++ compiler, delete a compiler cache that an interrupted run left broken "
    "(TORCHINDUCTOR_CACHE_DIR), or leave torch_compile out"
)
# what torch.compile raises where there is nothing to compile with
COMPILER_MISSING = ("InvalidCxxCompiler", "TritonMissing")


def compile_layers(model: Any) -> int:
    """Compile each decoder layer in place, with sizes left symbolic.

    The layers have one code and so share one graph (regional compilation, as
    `accelerate.utils.compile_regions` does on a copy, which our patched forward would not use).

    Args:
        model: a `PreTrainedModel`.

    Returns:
        The number of layers.
    """
    layers = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            for layer in module:
                layer.compile(dynamic=True)
            return layers
    return 0


def compiler_failed(error: Exception) -> bool:
    """Whether an error of a step came from torch.compile, not from the code it compiled."""
    return isinstance(error, TorchDynamoException)
