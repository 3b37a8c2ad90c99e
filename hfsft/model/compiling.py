"""Compiled decoder layers: few graphs for all layers and for every width of a micro-batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from hfsft.errors import RecipeError, first_line
from hfsft.recipe.schema import Stage

COMPILER_ADVICE = (
    "install a C++ compiler, delete a compiler cache that an interrupted run left broken "
    "(TORCHINDUCTOR_CACHE_DIR), or leave {} out"
)
# what torch.compile raises where there is nothing to compile with
COMPILER_MISSING = ("InvalidCxxCompiler", "TritonMissing")


def compile_layers(model: Any) -> int:
    """Compile each decoder layer in place, with sizes left symbolic.

    The layers have one code and so share their graphs (regional compilation, as
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


@contextmanager
def compiled_for(stage: Stage) -> Iterator[None]:
    """Report a failure of the compiler, not of the code it compiles, as the recipe's.

    Args:
        stage: has `torch_compile`, or an optimizer of torchao's, which compiles its update.

    Raises:
        RecipeError: if the compiler fails.
    """
    try:
        yield
    except TorchDynamoException as error:
        key = "torch_compile" if stage.trainer.get("torch_compile") else "optim"
        raise RecipeError(
            f"{stage.name}.{key}: {first_line(error)}\n  {COMPILER_ADVICE.format(key)}"
        ) from None
