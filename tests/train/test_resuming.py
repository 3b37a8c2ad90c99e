"""A stage that fails while it trains: its error, its record, and the same command again."""

import json

import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from safetensors.torch import load_file

from hfsft.doctor.stage_checks import train_tiny, write_recipe
from hfsft.errors import MemoryShortage


def test_memory_that_runs_out_in_an_update_is_one_message(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    whole = train_tiny(tmp_path, "whole", "--optim", "adamw_torch")
    step, calls = torch.optim.AdamW.step, []

    def runs_out(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # a checkpoint is due every 2 steps
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", runs_out)
    said = r"^sft: out of memory after step 3: CUDA out of memory\. .*\n  `hfsft plan RECIPE` says"
    with pytest.raises(MemoryShortage, match=said) as caught:
        train_tiny(tmp_path, "short", "--optim", "adamw_torch")
    assert caught.value.exit_status == 2
    record = tmp_path / "runs/short/sft/stage.json"
    assert json.loads(record.read_text())["status"] == "failed"
    assert torch.equal(train_tiny(tmp_path, "short", "--optim", "adamw_torch"), whole)
    assert len(calls) == 4 + 2


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_of_a_paged_optimizer_are_allocated_by_it_again(tmp_path, monkeypatch):
    """The allocation is the optimizer's own on a CPU too, though nothing is paged there."""
    write_recipe(tmp_path)
    paged = ("--optim", "paged_adamw_8bit")
    whole = train_tiny(tmp_path, "whole", *paged)
    train_tiny(tmp_path, "resumed", "--max_steps", "2", *paged)
    allocate, made = Optimizer8bit.get_state_buffer, []

    def remember(self, parameter, dtype):
        buffer = allocate(self, parameter, dtype)
        made.append(buffer.numel())
        return buffer

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", remember)
    assert torch.equal(train_tiny(tmp_path, "resumed", *paged), whole)
    # two states of each parameter, allocated once though two steps follow
    parameters = load_file(tmp_path / "runs/resumed/sft/model.safetensors")
    assert len(made) == 2 * len(parameters)
    assert sum(made) == 2 * whole.numel()
