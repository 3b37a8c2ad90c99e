"""Packed documents attend to themselves alone, whatever computes it."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from hfsft.errors import RecipeError
from hfsft.model.attention import (
    DOCUMENTS,
    VARLEN,
    document_attention,
    packed_attention,
    suits_varlen,
    varlen_attention,
)

SIZES = [5, 1, 10, 16, 9, 7]  # of documents: three rows of 16


def packed(heads=4, kv_heads=2, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    shape = {"dtype": dtype, "device": device, "requires_grad": True}
    query = torch.randn(3, heads, 16, 32, **shape)
    key, value = (torch.randn(3, kv_heads, 16, 32, **shape) for _ in range(2))
    ends = torch.tensor([0, *torch.tensor(SIZES).cumsum(0).tolist()], dtype=torch.int32)
    return (query, key, value), ends.to(device)


def masked(query, key, value, scaling):
    """The same by a mask of the whole batch of rows."""
    document = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES)).view(3, 1, 16)
    allowed = (document[..., None] == document[..., None, :]) & torch.ones(16, 16).tril().bool()
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=allowed.to(query.device), scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_document_attention_is_that_of_a_block_mask(heads, kv_heads):
    tensors, ends = packed(heads, kv_heads)
    out, weights = document_attention(None, *tensors, None, scaling=0.2, cu_seq_lens_q=ends)
    expected = masked(*tensors, 0.2)
    assert weights is None and out.shape == (3, 16, heads, 32)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(made.square().sum(), tensors) for made in (out, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_varlen_attention_is_that_of_a_block_mask(heads, kv_heads):
    tensors, ends = packed(heads, kv_heads, torch.bfloat16, "cuda")
    out, _ = varlen_attention(
        None, *tensors, None, scaling=0.2, cu_seq_lens_q=ends, max_length_q=max(SIZES)
    )
    expected = masked(*tensors, 0.2)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    grads = [torch.autograd.grad(made.float().square().sum(), tensors) for made in (out, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-2, rtol=5e-2)


def test_the_fastest_that_fits_is_chosen(make_model):
    model = make_model("llama")
    cpu = torch.device("cpu")
    assert packed_attention(model, cpu, half=False, longest=64) == DOCUMENTS != VARLEN
    # what the recipe asks for stays
    assert packed_attention(make_model("llama", "eager"), cpu, half=False, longest=64) == "eager"
    # a window that a row can outgrow needs a mask
    model.config.sliding_window = 32
    assert packed_attention(model, cpu, half=False, longest=64) == "sdpa"
    assert packed_attention(model, cpu, half=False, longest=None) == "sdpa"
    assert packed_attention(model, cpu, half=False, longest=32) == DOCUMENTS


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"head_dim": 256}, VARLEN),
        ("llama", {"head_dim": 20}, "sdpa"),
        ("llama", {"head_dim": 264}, "sdpa"),
        ("llama", {"hidden_size": 40}, "sdpa"),  # heads of 20
        ("llama", {"attention_dropout": 0.1}, "sdpa"),
        ("gpt2", {"attn_pdrop": 0.0}, VARLEN),
        ("gpt2", {}, "sdpa"),  # drops a tenth
        ("biogpt", {}, "sdpa"),
        ("deepseek_v3", {}, "sdpa"),  # queries of 192, values of 128
    ],
)
def test_the_kernel_of_a_card_gets_only_heads_that_it_takes(
    monkeypatch, model_type, settings, expected
):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}
    config = AutoConfig.for_model(model_type, **shape | settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert packed_attention(model, torch.device("cuda"), half=True, longest=64) == expected


@pytest.mark.parametrize("model_type", ["gemma4_text", "mamba"])
def test_heads_that_differ_by_layer_or_are_none_do_not_suit_the_kernel(model_type):
    assert not suits_varlen(AutoConfig.for_model(model_type))


def test_dropout_that_the_kernel_lacks_is_an_error():
    tensors, ends = packed()
    with pytest.raises(RecipeError, match=r"Linear drops attention weights, .*: eager"):
        varlen_attention(
            torch.nn.Linear(1, 1), *tensors, None, dropout=0.1, cu_seq_lens_q=ends, max_length_q=16
        )
