"""Muon: which parameters it trains, its update beside torch's own two optimizers, its state."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from hfsft.model.muon import _Float32Products, muon_adamw

STEPS = 6
BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def optimize(make_stage, tmp_path):
    """Makes the optimizer of `optim: muon` for a model; settings are those of `muon`."""

    def make(model, **muon):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, learning_rate=4e-3, weight_decay=0.1, adam_beta2=0.95
        )
        return muon_adamw(model, make_stage(trainer={"optim": "muon"}, muon=muon), args)

    return make


def step(model, optimizers, seed: int) -> None:
    """One update from seeded gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def names(model, groups) -> set[str]:
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_muon_trains_the_matrices_of_the_blocks_and_adamw_all_others(
    make_model, optimize, model_type, tied
):
    model = make_model(model_type, tie_word_embeddings=tied)
    optimizer = optimize(model, embedding_learning_rate=0.2, scale_by_width=True)
    *adamw, muon = optimizer.param_groups
    matrices = {name for name, _ in model.named_parameters() if name.split(".")[-2] in BLOCK}
    assert len(matrices) == 2 * (6 if model_type == "nanochat" else 7)
    assert names(model, [muon]) == matrices
    every = {name for name, _ in model.named_parameters()}
    assert names(model, adamw) == every - matrices
    assert muon["lr"] == 0.02
    scale = (64 / 768) ** -0.5
    rates = {name: group["lr"] for group in adamw for name in names(model, [group])}
    # a tied embedding is the head as well, and is trained as one
    assert rates["model.embed_tokens.weight"] == scale * (4e-3 if tied else 0.2)
    if not tied:
        assert rates["lm_head.weight"] == scale * 4e-3
    if model_type == "llama":
        decay = {name: group["weight_decay"] for group in adamw for name in names(model, [group])}
        assert decay["model.norm.weight"] == 0.0 and decay["model.embed_tokens.weight"] == 0.1


def test_updates_are_those_of_torchs_two_optimizers(make_model, optimize):
    model = make_model("nanochat", tie_word_embeddings=False)
    other = copy.deepcopy(model)
    optimizer = optimize(model, momentum_start=0.5, momentum=0.9, momentum_warmup_steps=4)
    matrices = [p for n, p in other.named_parameters() if n.split(".")[-2] in BLOCK]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    rest = [p for n, p in other.named_parameters() if n.split(".")[-2] not in BLOCK]
    adamw = torch.optim.AdamW(rest, 4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for number, momentum in enumerate((0.5, 0.6, 0.7, 0.8, 0.9, 0.9)):
        step(model, [optimizer], number)
        assert optimizer.param_groups[-1]["momentum"] == pytest.approx(momentum)
        muon.param_groups[0]["momentum"] = optimizer.param_groups[-1]["momentum"]
        with _Float32Products():  # as on a CPU
            step(other, [muon, adamw], number)
    for (name, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_loaded_state_continues_to_the_bit(make_model, optimize):
    model = make_model("llama")
    optimizer = optimize(model, momentum_warmup_steps=4)
    for number in range(2):
        step(model, [optimizer], number)
    resumed = copy.deepcopy(model)
    loaded = optimize(resumed, momentum_warmup_steps=4)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(2, STEPS):
        step(model, [optimizer], number)
        step(resumed, [loaded], number)
    assert loaded.param_groups[-1]["updates"] == STEPS
    for found, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_skipped_update_changes_nothing(make_model, optimize):
    model = make_model("llama")
    optimizer = optimize(model)
    step(model, [optimizer], 0)
    before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    after = optimizer.state_dict()
    assert [g["updates"] for g in after["param_groups"] if "updates" in g] == [1]
    for number, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][number][key]) for key in state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
