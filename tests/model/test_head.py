"""The loss in chunks: value and gradients against torch's own cross-entropy of whole logits."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from hfsft.model import head
from hfsft.model.head import fuse_head, linear_cross_entropy
from hfsft.tokens.encoding import IGNORED


def whole(hidden, weight, bias, targets, softcap, scale, dft):
    """Every logit at once, as a textbook writes it."""
    logits = nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits, targets, reduction="none")
    if dft:
        losses = losses * (-losses).exp().detach()
    return losses.sum(), (logits.argmax(1) == targets).sum()


def inputs(positions=50, width=16, vocabulary=300):
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=torch.float64, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, vocabulary, (positions,))


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dft", [False, True])
def test_value_and_gradients_are_those_of_whole_logits(
    monkeypatch, chunk_rows, softcap, scale, dft
):
    hidden, weight, bias, targets = inputs()
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_rows * 4 * 300)
    found, hits = linear_cross_entropy(hidden, weight, bias, targets, softcap, scale, dft)
    grads = torch.autograd.grad(found * 3, (hidden, weight, bias))
    expected, right = whole(hidden, weight, bias, targets, softcap, scale, dft)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # logits are float32
    assert hits.item() == right.item()
    for mine, theirs in zip(
        grads, torch.autograd.grad(expected * 3, (hidden, weight, bias)), strict=True
    ):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_frozen_weights_get_no_gradient():
    hidden, weight, _, targets = inputs()
    loss, _ = linear_cross_entropy(hidden, weight.detach(), None, targets)
    (grad,) = torch.autograd.grad(loss, hidden)
    expected, _ = whole(hidden, weight.detach(), None, targets, None, 1.0, False)
    assert (grad - torch.autograd.grad(expected, hidden)[0]).norm() < 1e-5 * grad.norm()


def test_no_trained_position_is_a_loss_of_zero():
    hidden, weight, _, targets = inputs()
    loss, hits = linear_cross_entropy(hidden[:0], weight, None, targets[:0])
    loss.backward()
    assert loss.item() == hits.item() == 0
    assert weight.grad.abs().sum() == 0


def test_bfloat16_autocast():
    hidden, weight, _, targets = (t.float() if t.is_floating_point() else t for t in inputs())
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, None, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    expected, _ = whole(hidden, weight, None, targets, None, 1.0, False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 2e-2 * theirs.norm()


SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def models(make_model):
    torch.manual_seed(0)
    return {
        "nanochat": make_model("nanochat"),  # softcap 15
        "llama": make_model("llama"),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SMALL)).eval(),  # softcap 30
        "granite": GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)).eval(),
    }


@pytest.mark.parametrize("name", ["nanochat", "llama", "gemma2", "granite"])
def test_fused_forward_is_the_models_own_loss(make_model, name):
    model = models(make_model)[name]
    ids = torch.randint(10, 500, (2, 20))
    labels = ids.where(torch.rand(2, 20) < 0.5, IGNORED)
    expected = model(input_ids=ids, labels=labels).loss
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    assert fuse_head(model)
    total, _ = model(
        input_ids=ids, targets=labels[row, column + 1], target_positions=row * 20 + column
    )
    assert total.item() / len(row) == pytest.approx(expected.item(), rel=1e-5)
    # without targets it is the forward it was: logits for generation
    assert model(input_ids=ids).logits.shape == (2, 20, 512)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 22)


def test_a_head_that_is_no_linear_layer_is_left_alone(make_model):
    model = make_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    forward = model.forward
    assert not fuse_head(model)
    assert model.forward == forward
