"""Kernels of other packages, where they are installed, beside hfsft's own: exact, and faster?"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from hfsft.doctor.findings import CheckFailed, NotHere
from hfsft.doctor.step_checks import (
    difference,
    packed_gradient,
    shortest,
    tiny_model,
    training_device,
)

FLASH = "flash_attention_2"
ROUNDED = 3e-2  # of gradients in bfloat16


def flash_attention() -> str:
    """Gradients and time of packed documents with flash-attn beside hfsft's own attention."""
    if training_device().type != "cuda" or find_spec("flash_attn") is None:
        raise NotHere("flash-attn, which is not needed: torch's own kernel does the same")
    return compare_attention(FLASH)


def compare_attention(name: str) -> str:
    """Gradients of packed documents with an attention beside those of each by itself.

    Args:
        name: an `attn_implementation`.

    Raises:
        CheckFailed: if they differ.
    """
    import torch

    from hfsft.model.attention import packed_attention
    from hfsft.model.head import fuse_head

    model, half = tiny_model(), torch.bfloat16
    fuse_head(model)
    expected = packed_gradient(model, False, half)
    own = packed_attention(model, training_device(), True, 128)
    seconds = []
    for attention in (own, name):
        model.set_attn_implementation(attention)
        gradient = packed_gradient(model, True, half)
        seconds.append(shortest(lambda: packed_gradient(model, True, half)))
    error = difference(gradient, expected)
    if not error < ROUNDED:
        raise CheckFailed(
            f"gradients differ by {error:.1e}", f"do not set attn_implementation: {name}"
        )
    return _said(error, seconds, f"attn_implementation: {name} uses it")


def other_heads() -> str:
    """Gradients and time of the heads of liger-kernel and cut-cross-entropy beside hfsft's."""
    installed = [name for name in ("liger_kernel", "cut_cross_entropy") if find_spec(name)]
    if training_device().type != "cuda" or not installed:
        raise NotHere("liger-kernel, cut-cross-entropy, which are not needed: the head is fused")
    heads = {"liger_kernel": _liger, "cut_cross_entropy": _cut_cross_entropy}
    return "; ".join(f"{name}: {compare_head(heads[name]())}" for name in installed)


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _cut_cross_entropy() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(
        hidden, weight, targets, reduction="sum"
    )


def compare_head(head: Callable[..., Any]) -> str:
    """Gradients of a head's summed loss beside those of hfsft's, in bfloat16.

    Args:
        head: of hidden states [tokens, width], weight [vocabulary, width], targets [tokens].

    Raises:
        CheckFailed: if they differ.
    """
    import torch

    from hfsft.model.head import linear_cross_entropy

    torch.manual_seed(0)
    device, half = training_device(), torch.bfloat16
    size = (4096, 65536) if device.type == "cuda" else (64, 512)
    hidden = torch.randn(size[0], 256, device=device, dtype=half, requires_grad=True)
    weight = (torch.randn(size[1], 256, device=device, dtype=half) / 16).requires_grad_()
    targets = torch.randint(size[1], (size[0],), device=device)

    def gradient(fused: Callable[..., Any]) -> Any:
        hidden.grad = weight.grad = None
        fused(hidden, weight, targets).backward()
        return torch.cat([hidden.grad.flatten(), weight.grad.flatten()]).float()

    def own(hidden: Any, weight: Any, targets: Any) -> Any:
        return linear_cross_entropy(hidden, weight, None, targets)[0]

    error = difference(gradient(head), gradient(own))
    if not error < ROUNDED:
        raise CheckFailed(f"gradients differ by {error:.1e}", "hfsft does not use it")
    seconds = [shortest(lambda fused=fused: gradient(fused)) for fused in (own, head)]
    return _said(error, seconds, "hfsft does not use it")


def _said(error: float, seconds: list[float], use: str) -> str:
    own, other = (second * 1e3 for second in seconds)
    return f"gradients agree to {error:.1e}, {other:.1f} ms beside hfsft's {own:.1f} ms; {use}"
