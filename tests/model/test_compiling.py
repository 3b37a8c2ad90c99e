"""Compiled layers on the CPU, with inductor: the losses of eager ones, from few graphs."""

import json

import pytest
import torch

from hfsft.doctor.findings import CheckFailed, NotHere
from hfsft.doctor.stage_checks import train_tiny, write_recipe
from hfsft.doctor.step_checks import compiled_layers
from hfsft.errors import RecipeError
from hfsft.model.compiling import COMPILER_ADVICE

# rows of many widths, one to three of them in a micro-batch
WORDS = (
    "--max_steps 12 --examples_per_step 10 --per_device_train_batch_size 3 --logging_steps 1 "
    "--save_strategy no --held_out 16 --eval_steps 6 --learning_rate 1e-3"
)


def losses(folder, name: str, *more: str) -> list[float]:
    """The loss of each step of a run."""
    train_tiny(folder, name, *WORDS.split(), "--sample_prompts", '["Who are you?"]', *more)
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
    assert 1 <= graphs <= 3  # one row or several, documents alone in their row or not
    samples = (tmp_path / "runs/compiled/sft/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, 6, 12]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def no_compiler():
    """No C++ compiler, and no compiled code of earlier runs to do without one."""
    torch._dynamo.reset()
    uncached = torch.compiler.config.patch(force_disable_caches=True)
    with uncached, torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        yield


def test_without_a_compiler_a_run_says_so(tmp_path, no_compiler):
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"sft\.torch_compile: InvalidCxxCompiler") as failure:
        train_tiny(tmp_path, "compiled", "--torch_compile", "true")
    assert str(failure.value).splitlines()[1:] == [f"  {COMPILER_ADVICE.format('torch_compile')}"]
    assert json.loads((tmp_path / "runs/compiled/sft/stage.json").read_text())["status"] == "failed"


def test_without_a_compiler_the_doctor_finds_nothing_wrong(no_compiler):
    with pytest.raises(NotHere, match=r"^InvalidCxxCompiler: .*/nowhere/g"):
        compiled_layers()


def test_a_compiler_that_fails_is_a_failure(no_compiler, monkeypatch):
    def broken(*args, **kwargs):
        raise ImportError("main is too short")

    monkeypatch.setattr("torch._inductor.graph.GraphLowering.codegen", broken)
    with pytest.raises(CheckFailed, match="ImportError: main is too short") as failure:
        compiled_layers()
    assert failure.value.advice == COMPILER_ADVICE.format("torch_compile")
