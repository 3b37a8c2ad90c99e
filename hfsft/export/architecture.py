"""NanoChat as Qwen3: the same function in an architecture that other readers have.

llama.cpp, vLLM, SGLang, MLX and CTranslate2 read Qwen3, and none of them NanoChat. The two differ
in five places, and the weights can be rewritten for each:

| NanoChat | Qwen3 | the weights |
|---|---|---|
| normalises the embedding's output | does not | rows of the embedding are normalised |
| norms without weights | with weights | ones |
| rotates by the angle's negative | by the angle | the halves of each query and key head swap |
| relu(W1 x)^2 | silu(G x) * (U x) | G = b W1, U = W1 / sqrt(b), W2 / sqrt(b): equal as b grows |
| caps the logits: c tanh(x / c) | does not | none: the order of the tokens is the same |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from hfsft.errors import ModelError

# b above: off by at most 0.54 / b^2 a neuron, so by 5e-7; a power of two, so that G and U quantise
# to the same integers as W1
SHARPNESS = 1024.0


@contextmanager
def uncapped(model: Any) -> Iterator[float | None]:
    """Compute the logits without a NanoChat model's cap, which no export keeps; yields the cap."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is None:
        yield None
        return
    model.config.final_logit_softcapping = None
    try:
        yield cap
    finally:
        model.config.final_logit_softcapping = cap


@torch.no_grad()
def as_qwen3(model: Any) -> Qwen3ForCausalLM:
    """The Qwen3 model that computes what a NanoChat model does, without its cap of the logits.

    Args:
        model: a `NanoChatForCausalLM`.

    Returns:
        A model of the same dtype on the CPU, with untied embeddings.

    Raises:
        ModelError: if the model has biases or another activation, which the mapping does not cover.
    """
    config = model.config
    if config.attention_bias or config.hidden_act != "relu2":
        raise ModelError(
            f"{config.name_or_path}: a NanoChat model with attention_bias: {config.attention_bias} "
            f"and hidden_act: {config.hidden_act} cannot be written as a Qwen3"
        )
    width = config.hidden_size // config.num_attention_heads
    width = getattr(config, "head_dim", None) or width
    mapped = Qwen3ForCausalLM(_qwen3_config(config, width)).to(model.dtype).eval()
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    mapped.load_state_dict(_qwen3_weights(weights, mapped.state_dict(), width, config.rms_norm_eps))
    return mapped


def _qwen3_config(config: Any, width: int) -> Qwen3Config:
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return Qwen3Config(
        **{name: getattr(config, name) for name in shared},
        head_dim=width,
        tie_word_embeddings=False,  # the embedding is normalised, the head is not
        dtype=config.dtype,
    )


def _qwen3_weights(
    weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], width: int, eps: float
) -> dict[str, torch.Tensor]:
    """NanoChat's weights under Qwen3's names; `wanted` has these names and shapes."""
    found = {}
    for name, like in wanted.items():
        if name.endswith("norm.weight"):
            found[name] = torch.ones_like(like)
        elif name.endswith("embed_tokens.weight"):
            rows = weights[name].double()
            scale = torch.rsqrt(rows.pow(2).mean(dim=1, keepdim=True) + eps)
            found[name] = rows * scale
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            found[name] = swapped_halves(weights[name], width)
        elif name.endswith("gate_proj.weight"):
            found[name] = weights[name.replace("gate_proj", "fc1")] * SHARPNESS
        elif name.endswith("up_proj.weight"):
            found[name] = weights[name.replace("up_proj", "fc1")] / SHARPNESS**0.5
        elif name.endswith("down_proj.weight"):
            found[name] = weights[name.replace("down_proj", "fc2")] / SHARPNESS**0.5
        else:
            found[name] = weights[name]
    return found


def swapped_halves(weight: torch.Tensor, width: int) -> torch.Tensor:
    """The rows of every head of `width` rows, its second half first; [heads * width, inputs]."""
    return weight.unflatten(0, (-1, 2, width // 2)).flip(1).flatten(0, 2)
