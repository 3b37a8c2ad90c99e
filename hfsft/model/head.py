"""The fused head: cross-entropy from the hidden states of trained positions alone, in chunks.

The logits of 2 x 1,024 tokens and a vocabulary of 65,536 fill 1.8 GiB with their loss and gradient,
and most positions of a chat are not trained on at all.
"""

import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

# float32 logits of one chunk: large enough to keep a GPU busy, small beside a layer's activations
CHUNK_BYTES = 64 * 2**20


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `linear(hidden, weight, bias)`; forward also computes the gradient.

    As in linkedin/Liger-Kernel (Hsu et al. 2024), each chunk's logits are overwritten by their own
    gradient, so that they are computed once and never all in memory; here in plain PyTorch.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, scale, dft):
        needs = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros_like(tensor, dtype=torch.float32) if need else None
            for tensor, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = _logits(part, weight, bias, softcap, scale)
            chosen = logits.gather(1, target)
            # argmax breaks ties by first index: an all-zero head does not get every target right
            correct += (logits.argmax(1, keepdim=True) == target).sum()
            log_probs = chosen - logits.logsumexp(1, keepdim=True)
            share = log_probs.exp() if dft else None  # Wu et al. 2025: weight by probability
            total -= (log_probs * share if dft else log_probs).sum()
            if not any(needs):
                continue
            # d loss / d logits = softmax - one-hot
            slope = 1 - (logits / softcap).square_() if softcap is not None else None
            grad = logits.sub_(chosen - log_probs).exp_()
            grad.scatter_add_(1, target, torch.full_like(log_probs, -1.0))
            if dft:
                grad *= share
            if slope is not None:
                grad *= slope
            if scale != 1.0:
                grad *= scale
            grad = grad.to(_product_dtype(weight))
            if needs[0]:
                grads[0][start : start + rows] = grad @ weight
            if needs[1]:
                if grad.dtype == part.dtype == torch.float32:
                    grads[1].addmm_(grad.t(), part)
                else:
                    grads[1] += grad.t() @ part.to(grad.dtype)
            if needs[2]:
                grads[2] += grad.sum(0)
        dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden, weight, bias)]
        ctx.save_for_backward(
            *(
                grad if grad is None else grad.to(dtype)
                for grad, dtype in zip(grads, dtypes, strict=True)
            )
        )
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx, grad_total, _):
        # in place: a copy would add another gradient of the whole vocabulary to the peak
        grads = [grad if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None)


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    dft: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of a linear head, without materialising all of its logits.

    Args:
        hidden: [positions, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        targets: [positions] int64, the token that each position predicts.
        softcap: logits become `softcap * tanh(logits / softcap)`; None: unchanged.
        scale: multiplies the logits before that.
        dft: weight each token's loss by its detached probability (trl's `loss_type: dft`).

    Returns:
        The sum of the losses (differentiable), and how many targets are the top-1 token.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, softcap, scale, dft)


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of each target, for validation; arguments as `linear_cross_entropy`.

    Returns:
        float32 [positions], and bool [positions]: whether the target is the top-1 token.
    """
    losses, correct = [], []
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for part, target in zip(hidden.split(rows), targets[:, None].split(rows), strict=True):
        logits = _logits(part, weight, bias, softcap, scale)
        chosen = logits.gather(1, target)
        correct.append((logits.argmax(1, keepdim=True) == target).flatten())
        losses.append((logits.logsumexp(1, keepdim=True) - chosen).flatten())
    return torch.cat(losses), torch.cat(correct)


def _logits(
    part: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    logits = linear(part, weight, bias).float()
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def fuse_head(model: Any, dft: bool = False) -> bool:
    """Patch a causal language model's forward to return the loss of chosen positions.

    With `targets` (int64 [positions]) and `target_positions` (int64 [positions], into the flattened
    batch) it returns what `linear_cross_entropy` returns, with `each=True` what `token_losses`
    returns; without them it is unchanged. DDP and FSDP need it to be one forward of the model.

    Args:
        model: a `PreTrainedModel`, or the one inside a `PeftModel`; changed in place.
        dft: see `linear_cross_entropy`.

    Returns:
        False, and the model is unchanged, if its head is not a plain linear layer.
    """
    from peft.utils.other import ModulesToSaveWrapper

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear | ModulesToSaveWrapper) or model.base_model is model:
        return False
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _logit_scale(config)
    original = model.forward

    def forward(self, *args, targets=None, target_positions=None, each=False, **kwargs):
        if targets is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        # looked up at each call: peft and FSDP replace it later
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):  # FSDP2
            weight, bias = weight.full_tensor(), bias if bias is None else bias.full_tensor()
        hidden = hidden.flatten(0, 1)[target_positions]
        with _gathered(weight):
            if each:
                return token_losses(hidden, weight, bias, targets, softcap, scale)
            return linear_cross_entropy(hidden, weight, bias, targets, softcap, scale, dft)

    model.forward = types.MethodType(forward, model)
    return True


def _gathered(weight: torch.Tensor) -> Any:
    """Gather a parameter that DeepSpeed's ZeRO-3 has partitioned; elsewhere do nothing."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def _logit_scale(config: Any) -> float:
    """The factor of a model's logits, under the names that transformers' configs have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1 / divisor
