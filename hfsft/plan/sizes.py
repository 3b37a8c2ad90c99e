"""Bytes of a stage's models, optimizer states and checkpoints."""

from math import ceil, prod
from typing import Any

from torch import nn

from hfsft.model.muon import split_parameters
from hfsft.model.optimizer import state_bytes
from hfsft.recipe.schema import MUON


def checkpoint_bytes(model: Any, optimizer: Any) -> int:
    """Bytes of a checkpoint: the weights it saves and the optimizer's states as they are.

    Args:
        model: of one with an adapter, only the trained parameters are saved.
        optimizer: as Accelerate wraps it, after its first step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    return tensors_bytes([*saved, optimizer.state_dict()["state"]])


def tensors_bytes(held: Any) -> int:
    """Bytes of all tensors in nested data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(held))


def _tensors(held: Any) -> list[Any]:
    """All tensors in nested data; of torchao's low-bit states those that they are made of."""
    if hasattr(held, "tensor_attrs"):
        return [getattr(held, name) for name in held.tensor_attrs]
    if isinstance(held, (dict, list)):
        values = held.values() if isinstance(held, dict) else held
        return [tensor for value in values for tensor in _tensors(value)]
    return [held] if hasattr(held, "element_size") else []


# states of an optimizer for each trained parameter, by a part of its name; any other has two
STATES = {"sgd": 0, "lomo": 0, "lion": 1, "adagrad": 1, "rmsprop": 1, "ademamix": 3}
SMALL_8BIT = 4096  # elements; bitsandbytes keeps the states of smaller tensors in 32 bits
SMALL_FILES = 2**16  # bytes of a checkpoint's schedule, random states, log and manifest


def optimizer_bytes(model: nn.Module, optim: str) -> int:
    """Bytes of an optimizer's states on disk.

    Args:
        model: those of its parameters that require gradients have states.
        optim: `muon` or transformers' name; an unknown one is assumed to have two 32-bit states.
    """
    known = state_bytes(model, optim)
    if known is not None:
        return sum(known.values())
    matrices = {id(weight) for weight in split_parameters(model)[0]} if optim == MUON else ()
    count = next((count for part, count in STATES.items() if part in optim), 2)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    total = 0
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        size, width = weight.numel(), weight.element_size()
        if "8bit" in optim and size >= SMALL_8BIT and id(weight) not in embeddings:
            width = 1 + 4 / 256  # and one scale for each block
        elif "bit" in optim:
            width = 4
        if optim == "adafactor" and weight.ndim > 1:
            *rest, rows, columns = weight.shape
            total += 4 * prod(rest) * (rows + columns)
        elif optim == "adafactor":
            total += 4 * size
        else:
            total += ceil((1 if id(weight) in matrices else count) * size * width)
    return total


def checkpoint_size(model: nn.Module, optim: str) -> int:
    """Bytes of a checkpoint's large files, before the first step.

    Args:
        model: of one with an adapter, the trained parameters are saved.
        optim: transformers' name.
    """
    saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
    return sum(p.numel() * p.element_size() for p in saved) + optimizer_bytes(model, optim)


def model_size(model: nn.Module) -> int:
    """Bytes of the finished model, and of the adapter beside it."""
    adapter = 0
    if hasattr(model, "peft_config"):
        adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # 4-bit weights are packed in pairs, and merged in 16 bits
    whole = sum(
        p.numel() * (p.element_size() if p.is_floating_point() else 4) for p in model.parameters()
    )
    return whole + adapter


def steps_of(share: float, max_steps: int) -> int:
    """A setting such as `eval_steps` in steps: below 1 it is a share of `max_steps`, rounded up."""
    return ceil(share * max_steps) if share < 1 else int(share)


def most_checkpoints(settings: dict[str, Any], max_steps: int | None) -> int:
    """How many checkpoints exist at a time at most, with the one being written.

    Args:
        settings: of the trainer.
        max_steps: of the stage; None: not known yet. Without `save_total_limit`, only those of
            `save_strategy: steps` can be counted ahead.
    """
    if settings.get("save_strategy") == "no":
        return 0
    every, steps = settings.get("save_steps", 500), max_steps or 0
    by_steps = settings.get("save_strategy", "steps") == "steps" and steps
    saves = ceil(steps / steps_of(every, steps)) if by_steps else None
    kept = min((n for n in (settings.get("save_total_limit"), saves) if n is not None), default=1)
    extra = (settings.get("metric_for_best_model") is not None) + (
        settings.get("lr_scheduler_type") == "warmup_stable_decay"
    )
    return kept + extra + 1
