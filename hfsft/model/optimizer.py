"""Which optimizer a stage gets: what transformers is told, Muon, the sizes of low-bit states."""

from collections.abc import Callable
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from torch import nn

from hfsft.errors import RecipeError
from hfsft.model.muon import muon_adamw
from hfsft.recipe.schema import MUON, Stage

# optimizers of other packages: a part of the name → its package, as pip and as Python know it
PACKAGES = {
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "apollo": ("apollo-torch", "apollo_torch"),
}
# how to install them; APOLLO's licence forbids commercial use, so it is no extra of hfsft
INSTALL = {
    "torchao": "pip install 'hfsft[torchao]'",
    "apollo-torch": "pip install apollo-torch (its licence is CC BY-NC)",
}
TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
APOLLO = "apollo_adamw"
APOLLO_RANK = 128  # transformers' default, which `optim_args: rank=64` changes
# for weights in bfloat16, from most to least memory per parameter
FOR_BFLOAT16 = (*TORCHAO, APOLLO)


def missing_package(optim: str) -> str | None:
    """The package, as pip knows it, that an optimizer needs and that is not installed."""
    for part, (package, module) in PACKAGES.items():
        if part in optim and find_spec(module) is None:
            return package
    return None


def require_package(stage: Stage) -> None:
    """Refuse a stage whose optimizer is in a package that is not installed.

    Raises:
        RecipeError: with how to install it.
    """
    optim = str(stage.trainer.get("optim"))
    package = missing_package(optim)
    if package is not None:
        raise RecipeError(f"{stage.name}.optim: {optim} needs {package}: {INSTALL[package]}")


def optimizer_settings(stage: Stage) -> dict[str, Any]:
    """The settings of `TrainingArguments` that choose a stage's optimizer.

    torchao's optimizers round weights in bfloat16 stochastically, unless `optim_args` says
    otherwise: rounded to nearest, an update below some 1/256 of a weight is lost. APOLLO projects
    every linear layer unless `optim_target_modules` names some.
    """
    keys = ("optim", "optim_args", "optim_target_modules")
    settings = {key: stage.trainer[key] for key in keys if stage.trainer.get(key) is not None}
    optim = settings.get("optim", "")
    if optim == MUON:
        settings["optim"] = "adamw_torch"  # transformers has no name for it: see `own_optimizer`
    if optim in TORCHAO and stage.dtype == "bfloat16":
        settings.setdefault("optim_args", "bf16_stochastic_round=True")
    if optim.startswith("apollo"):
        settings.setdefault("optim_target_modules", "all-linear")
    return settings


def own_optimizer(stage: Stage, args: Any) -> tuple[Callable[[], Any], dict[str, Any]] | None:
    """What `Trainer` takes as `optimizer_cls_and_kwargs` for Muon; None for transformers' own.

    Args:
        stage: `optim` and `muon`.
        args: its `TrainingArguments`.
    """
    optim = stage.trainer.get("optim")
    if optim == APOLLO:
        allow_apollo_states()
    if optim != MUON:
        return None
    # transformers calls what the first of the two returns with the model
    return (lambda: muon_adamw), {"stage": stage, "args": args}


def allow_apollo_states() -> None:
    """Let a checkpoint's optimizer hold APOLLO's projections, which are objects, not tensors."""
    from apollo_torch.random_projector import GradientProjector
    from apollo_torch.svd_projector import GaLoreProjector

    torch.serialization.add_safe_globals([GradientProjector, GaLoreProjector])


def page_states(optimizer: Any) -> None:
    """Move the loaded states of a paged optimizer back to paged memory.

    bitsandbytes loads them as plain tensors of the card, where they then stay.

    Args:
        optimizer: a bitsandbytes one with `is_paged`, its states loaded.
    """
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                loaded = state[name]
                state[name] = optimizer.get_state_buffer(parameter, loaded.dtype)
                state[name].copy_(loaded)


def state_bytes(model: nn.Module, optim: str) -> dict[nn.Parameter, int] | None:
    """Bytes of the states that torchao's optimizers and APOLLO keep of each trained parameter.

    Args:
        model: those of its parameters that require gradients have states.
        optim: its name; None is returned for any other.
    """
    if optim not in FOR_BFLOAT16:
        return None
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - looked_up
    sizes = {}
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        if optim in TORCHAO:
            sizes[weight] = _low_bit_bytes(weight, 8 if optim == TORCHAO[0] else 4)
        elif id(weight) in linear:  # two states of low rank, and the projection
            count = APOLLO_RANK * (2 * max(weight.shape) + min(weight.shape))
            sizes[weight] = count * weight.element_size()
        else:
            sizes[weight] = 2 * weight.numel() * weight.element_size()
    return sizes


def _low_bit_bytes(weight: nn.Parameter, bits: int) -> int:
    """Bytes of torchao's two states of a parameter: codes, a scale a block, and a lookup table."""
    size, block = weight.numel(), 256  # transformers' default for both
    if size < 4096 or size % block:
        return 2 * size * weight.element_size()
    return 2 * (ceil(size * bits / 8) + 4 * size // block + 4 * 2**bits)
