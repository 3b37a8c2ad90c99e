"""Compiled layers on the CPU, with inductor: the losses of eager ones, from few graphs."""

import json

import pytest
import torch

from hfsft.doctor.stage_checks import train_tiny, write_recipe

# rows of many widths, one to three of them in a micro-batch
WORDS = "--max_steps 12 --examples_per_step 10 --per_device_train_batch_size 3 --logging_steps 1"


def losses(folder, name: str, *more: str) -> list[float]:
    """The loss of each step of a run."""
    train_tiny(folder, name, *WORDS.split(), "--save_strategy", "no", *more)
    lines = (folder / "runs" / name / "sft" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.slow  # a C++ compiler makes the kernels
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, checkpointing):
    write_recipe(tmp_path)
    words = ("--gradient_checkpointing", checkpointing)
    eager = losses(tmp_path, "eager", *words)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses(tmp_path, "compiled", *words, "--torch_compile", "true")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(eager) == 12 and eager[-1] < eager[0]
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert 1 <= graphs <= 3
    assert not torch._dynamo.utils.counters["graph_break"]
