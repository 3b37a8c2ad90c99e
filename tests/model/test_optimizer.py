"""What an optimizer is set up with, and the sizes of its states beside the real ones."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hfsft.model.optimizer import missing_package, optimizer_settings, state_bytes
from hfsft.plan.sizes import optimizer_bytes, tensors_bytes


def built(model, stage, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, **optimizer_settings(stage))
    return Trainer(model, args).create_optimizer()


def test_weights_in_bfloat16_are_rounded_stochastically_unless_the_recipe_says_otherwise(
    make_stage,
):
    settings = {"optim": "adamw_torch_8bit"}
    assert "optim_args" not in optimizer_settings(make_stage(trainer=settings))
    stage = make_stage(trainer=settings, dtype="bfloat16")
    assert optimizer_settings(stage)["optim_args"] == "bf16_stochastic_round=True"
    nearest = settings | {"optim_args": "bf16_stochastic_round=False"}
    stage = make_stage(trainer=nearest, dtype="bfloat16")
    assert optimizer_settings(stage)["optim_args"] == "bf16_stochastic_round=False"


def test_transformers_own_optimizers_keep_their_settings(make_stage):
    assert optimizer_settings(make_stage(trainer={"optim": "sgd"})) == {"optim": "sgd"}
    assert state_bytes(torch.nn.Linear(4, 4), "sgd") is None
    assert missing_package("adamw_torch_fused") is None


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_sizes_of_torchaos_states(make_model, make_stage, tmp_path, optim):
    pytest.importorskip("torchao")
    model = make_model("llama").bfloat16()
    optimizer = built(model, make_stage(trainer={"optim": optim}, dtype="bfloat16"), tmp_path)
    assert optimizer.bf16_stochastic_round
    # what its first step makes before it compiles the update
    states = [
        optimizer._new_buffer(parameter, signed)
        for parameter in model.parameters()
        for signed in (True, False)
    ]
    assert tensors_bytes(states) == optimizer_bytes(model, optim)


def test_sizes_of_apollos_states(make_model, make_stage, tmp_path):
    pytest.importorskip("apollo_torch")
    model = make_model("llama", intermediate_size=256).bfloat16()
    optimizer = built(model, make_stage(trainer={"optim": "apollo_adamw"}), tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    projections = [s["projector"].ortho_matrix for s in states if "projector" in s]
    assert len(projections) == 2 * 7 + 1  # the head is a linear layer of its own
    # the norm of each matrix's last update is a number of its own
    norms = [state["scaled_grad"] for state in states if "scaled_grad" in state]
    found = tensors_bytes([*states, *projections]) - tensors_bytes(norms)
    assert found == optimizer_bytes(model, "apollo_adamw")


def test_size_of_muons_states(make_model, make_stage, tmp_path):
    from hfsft.model.muon import muon_adamw

    model = make_model("nanochat", tie_word_embeddings=False)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    optimizer = muon_adamw(model, make_stage(trainer={"optim": "muon"}), args)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    steps = 4 * sum("step" in state for state in states)  # AdamW counts each parameter's updates
    assert tensors_bytes(list(states)) - steps == optimizer_bytes(model, "muon")
