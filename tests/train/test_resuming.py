"""A stage that fails while it trains: its error, its record, and the same command again."""

import json

import pytest
import torch

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
