"""What only a CUDA GPU can show; `make test-gpu`."""

import json

import pytest
import torch
from accelerate import PartialState
from bitsandbytes.optim import PagedAdamW8bit
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback
from transformers.activations import ReLUSquaredActivation

from hfsft.data.packing import on_device
from hfsft.doctor import step_checks
from hfsft.doctor.examine import examine
from hfsft.doctor.findings import FAILED
from hfsft.doctor.stage_checks import train_tiny, write_recipe
from hfsft.model.activation import SquaredReLU
from hfsft.model.optimizer import page_states
from hfsft.plan.plan import plan_stage
from hfsft.recipe.loading import load_recipe
from hfsft.train.trainer import SFTStageTrainer

QUIET = ("--save_strategy", "no", "--logging_steps", "100")  # no other reason to wait
STATES = ("state1", "state2")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
pytestmark = pytest.mark.gpu


def test_every_check_of_doctor_passes():
    found = examine()
    assert [check for check in found["checks"] if check["status"] == FAILED] == []
    assert len(found["checks"]) == 14


def test_a_stage_trains_on_the_card_and_as_planned(tmp_path):
    write_recipe(tmp_path)
    argv = [str(tmp_path / "recipe.yaml")]
    recipe = load_recipe(*argv, stage="sft")
    plan = plan_stage(recipe, recipe.sft)
    assert PartialState().device.type == "cuda"  # planning once moved it to the CPU
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_tiny(tmp_path, "planned")
    record = json.loads((tmp_path / "runs/planned/sft/stage.json").read_text())
    assert record["device"] == torch.cuda.get_device_name()
    # cuBLAS allocates two workspaces of its own, of up to 32 MiB each, for forward and backward
    measured = record["peak_allocated_bytes"] - before
    assert plan.peak - plan.overhead <= measured + 2**20
    assert measured <= plan.peak - plan.overhead + 70 * 2**20


def test_relu_squared_has_the_bits_of_autocast_in_less_memory():
    torch.manual_seed(0)
    hidden = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 1024, device="cuda")
    results = []
    for module in (ReLUSquaredActivation(), SquaredReLU()):
        given = hidden.clone().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            out = module(given) @ weight
        kept = torch.cuda.memory_allocated() - before
        out.float().square().sum().backward()
        results.append((out.detach(), given.grad, kept))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][2] < results[0][2]


def test_inputs_of_layers_in_main_memory_change_no_weight(tmp_path):
    write_recipe(tmp_path)
    words = (*QUIET, "--gradient_checkpointing", "true")
    offload = ("--activation_checkpointing_kwargs", "{offload: true}")
    whole, again = (train_tiny(tmp_path, name, *words) for name in ("whole", "again"))
    offloaded = train_tiny(tmp_path, "offloaded", *words, *offload)
    noise = step_checks.difference(again, whole)  # of two equal runs on this card
    assert step_checks.difference(offloaded, whole) <= 2 * noise + 1e-7


def test_a_step_waits_for_the_card_once(tmp_path, monkeypatch):
    """Copies from the card: the finite check, the log line, and the count of the step's tokens.

    Passed on an H100 without `cudaDeviceSynchronize` in `WAITS`; not run since. The profiler's own
    wait at its end counts as half a one.
    """
    write_recipe(tmp_path)
    record = profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
        schedule=schedule(wait=2, warmup=1, active=2, repeat=1),
    )

    class Profiled(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            record.step()

    made = SFTStageTrainer.__init__

    def with_profiler(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.add_callback(Profiled())

    monkeypatch.setattr(SFTStageTrainer, "__init__", with_profiler)
    with record:
        # bitsandbytes' optimizers wait once for each tensor
        optim = ("--optim", "adamw_torch_fused")
        train_tiny(tmp_path, "profiled", "--max_steps", "6", *optim, *QUIET)
    waits = {event.key: event.count / 2 for event in record.key_averages() if event.key in WAITS}
    assert sum(waits.values()) <= 4, waits


def test_slices_are_copied_from_pinned_memory():
    """Written without a GPU; not run yet."""
    rows = torch.arange(4096).view(64, 64).pin_memory()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        copied = on_device({"slice": rows[:8, :32], "whole": rows}, torch.device("cuda"))
        torch.cuda.synchronize()
    assert torch.equal(copied["slice"].cpu(), rows[:8, :32])
    copies = [event.key for event in record.key_averages() if "Memcpy HtoD" in event.key]
    assert copies and not any("Pageable" in name for name in copies)


def test_paged_states_are_paged_again_after_they_are_loaded():
    """Written without a GPU; not run yet."""
    weights = [torch.nn.Parameter(torch.randn(size, 512, device="cuda")) for size in (512, 2)]

    def stepped(optimizer):
        for index, weight in enumerate(weights):
            weight.grad = torch.full_like(weight, 1e-3 * (index + 1))
        optimizer.step()
        return optimizer

    first = stepped(PagedAdamW8bit(weights))
    after = [weight.detach().clone() for weight in weights]
    second = PagedAdamW8bit(weights)
    second.load_state_dict(first.state_dict())
    assert not any(hasattr(second.state[weights[0]][name], "is_paged") for name in STATES)
    page_states(second)
    for name in STATES:
        large, small = (second.state[weight][name] for weight in weights)
        assert large.is_paged and large.page_deviceid == torch.cuda.current_device()
        assert small.device.type == "cuda"  # below 100,000 numbers nothing is paged
        assert torch.equal(large.cpu(), first.state[weights[0]][name].cpu())
    stepped(first)
    expected = [weight.detach().clone() for weight in weights]
    for weight, before in zip(weights, after, strict=True):
        weight.data.copy_(before)
    stepped(second)
    assert all(torch.equal(weight, then) for weight, then in zip(weights, expected, strict=True))


def test_compiled_layers_make_at_most_three_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert "agree" in step_checks.compiled_layers()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
