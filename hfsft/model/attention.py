"""Attention within the documents of a packed row, without a mask.

A mask grows with the square of the row, and most of it is masked out. Both implementations are
registered with transformers.AttentionInterface, which builds no mask for them.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from hfsft.errors import RecipeError

DOCUMENTS = "hfsft_documents"  # any device, one call a document


VARLEN = "hfsft_varlen"  # CUDA, half precision, one call


# of the attention's weights, as the configs of transformers' models name it
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, one `scaled_dot_product_attention` call a document.

    Args:
        module: the attention layer.
        query: [rows, heads, length, width]; key and value may have fewer heads.
        key: as query.
        value: as query.
        attention_mask: None.
        scaling: of the scores.
        dropout: of the attention's weights.
        cu_seq_lens_q: int32 on the CPU, the cumulative document lengths in the flattened rows; no
            document spans two rows.
        kwargs: further arguments of transformers, unused.

    Returns:
        [rows, length, heads, width], and None for the weights.
    """
    rows, heads, length, _ = query.shape
    sizes = cu_seq_lens_q.diff().tolist()
    # the gradient of split is one concatenation, that of slicing a zero-filled row a document
    pieces = [_flat(tensor).split(sizes, dim=1) for tensor in (query, key, value)]
    outputs = [
        scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=key.shape[1] != heads,
        )[0]
        for q, k, v in zip(*pieces, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1).reshape(rows, length, heads, -1), None


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, heads, length, width] → [heads, rows · length, width]"""
    return tensor.transpose(0, 1).flatten(1, 2)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of all documents in one call: `torch.nn.attention.varlen`, on CUDA.

    Args and returns as `document_attention`, but `cu_seq_lens_q` is on the device, and
    `max_length_q` is the longest document's length, and `dropout` is 0.

    Raises:
        RecipeError: if dropout is asked for, which the kernel lacks.
    """
    if dropout:
        raise RecipeError(
            f"{type(module).__name__} drops attention weights, which {VARLEN} cannot: set "
            "attn_implementation: eager"
        )
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, length, _ = query.shape
    # torch 2.11 groups heads without being told, and has no argument for it
    grouped = {"enable_gqa": True} if _takes_gqa() and key.shape[1] != heads else {}
    half = (
        query.dtype if query.dtype != torch.float32 else torch.get_autocast_dtype(query.device.type)
    )
    out = varlen_attn(
        # norms in float32 return float32; the kernel takes half precision only
        *(_flat(tensor).transpose(0, 1).to(half) for tensor in (query, key, value)),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    return out.reshape(rows, length, heads, -1), None


@cache
def _takes_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def suits_varlen(config: Any) -> bool:
    """Whether the kernel of `varlen_attention` takes the heads of a model, and it needs no dropout.

    FlashAttention takes heads of up to 256 in steps of 8, with values as wide as queries; those of
    multi-head latent attention (`v_head_dim`) are narrower.
    """
    text = config.get_text_config()
    try:
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        narrow = getattr(text, "v_head_dim", None) is not None
        drops = any(getattr(text, name, None) for name in DROPOUTS)
    except (AttributeError, RuntimeError):  # no heads, or transformers': heads differ by layer
        return False
    return size % 8 == 0 and size <= 256 and not (narrow or drops)


AttentionInterface.register(DOCUMENTS, document_attention)


AttentionInterface.register(VARLEN, varlen_attention)


def packed_attention(
    model: Any, device: torch.device, half: bool, longest: int | None, compiled: bool = False
) -> str:
    """The fastest attention that keeps the documents of a packed row separate.

    Args:
        model: a `PreTrainedModel` with its original implementation.
        device: where it trains.
        half: whether it computes in bfloat16 or float16.
        longest: tokens of the longest row; None: not known.
        compiled: whether its layers are, by torch.compile.

    Returns:
        A name for `set_attn_implementation`; the model's own where that is not sdpa, or where it
        needs a sliding window, dropout or heads that ours lack.
    """
    own = model.config._attn_implementation
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if own != "sdpa" or (window is not None and (longest is None or window < longest)):
        return own
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return VARLEN if half and ampere and suits_varlen(config) else own
    # a call a document would be compiled anew for each number of documents
    return DOCUMENTS if device.type == "cpu" and not compiled else own
