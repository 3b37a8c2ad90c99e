"""Processes and sharding: refused where they are not what was asked for, or cannot be resumed."""

from dataclasses import replace
from pathlib import Path

import pytest

from hfsft.errors import CheckpointError, RecipeError
from hfsft.recipe.schema import Stage
from hfsft.train.checkpointing import share_of_sums
from hfsft.train.layout import (
    Layout,
    check_resumable,
    layout_of,
    require_layout,
    require_shardable,
)

STAGE = Stage(name="sft", folder=Path("runs/r/sft"), seed=1, data=[], held_out=0)
DDP_FILES = {"optimizer.pt": {}, "scheduler.pt": {}}


@pytest.fixture
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_is_one(alone):
    assert str(require_layout(STAGE, cpu=True)) == "1 process on 1 machine"
    assert str(Layout("DDP", 4, 2)) == "4 processes on 2 machines, DDP"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MASTER_ADDR", "127.0.0.1", "as accelerate launch does"),
        ("WORLD_SIZE", "2", "WORLD_SIZE is 2"),
        ("SLURM_STEP_NUM_TASKS", "4", "srun started 4 tasks"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP was asked for, but on the CPU"),
    ],
)
def test_what_was_asked_for_and_does_not_run_is_refused(alone, name, value, words):
    alone.setenv(name, value)
    with pytest.raises(RecipeError, match=words) as refused:
        require_layout(STAGE, cpu=True)
    assert str(refused.value).count("\n") == 1
    assert refused.value.exit_status == 2


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_fsdp_refuses_an_optimizer_that_does_not_shard(alone, optim):
    stage = replace(STAGE, trainer={"optim": optim})
    require_shardable(stage)
    alone.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=f"sft.optim: {optim} .*\n  --optim adamw_torch_fused"):
        require_shardable(stage)
    require_shardable(replace(STAGE, trainer={"optim": "adamw_torch_8bit"}))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (Layout("DDP", 2, 1), Layout("DDP", 1, 1)),
        (Layout("DDP", 1, 1), Layout("DDP", 8, 2)),
        (Layout("DDP", 4, 2), Layout("DDP", 4, 1)),
    ],
)
def test_ddp_resumes_under_any_number_of_processes(tmp_path, then, now):
    check_resumable(tmp_path, {"layout": then.as_data(), "files": DDP_FILES}, now)


@pytest.mark.parametrize(
    ("then", "files", "now"),
    [
        (Layout("ZeRO-2", 2, 1), {"global_step4/x_optim_states.pt": {}}, Layout("DDP", 1, 1)),
        (Layout("ZeRO-2", 2, 1), {"global_step4/x_optim_states.pt": {}}, Layout("ZeRO-2", 4, 1)),
        (Layout("FSDP2", 2, 1), {"optimizer.bin": {}}, Layout("DDP", 2, 1)),
        (Layout("DDP", 2, 1), DDP_FILES, Layout("FSDP2", 2, 1)),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_two_lines(tmp_path, then, files, now):
    with pytest.raises(CheckpointError, match=f"was written by .*{then.kind}.* this is ") as error:
        check_resumable(tmp_path, {"layout": then.as_data(), "files": files}, now)
    assert str(error.value).count("\n") == 1 and "--restart" in str(error.value)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2", "ZeRO-2"])
def test_nothing_resumes_without_its_optimizer(tmp_path, kind):
    layout = Layout(kind, 2, 1)
    manifest = {"layout": layout.as_data(), "files": {"model.safetensors": {}}}
    with pytest.raises(CheckpointError, match="no states of the optimizer"):
        check_resumable(tmp_path, manifest, layout)


def test_a_checkpoint_from_before_it_kept_its_layout(tmp_path):
    (tmp_path / "place.json").write_text('{"sums": [[1.0, 2.0, 3], [3.0, 4.0, 5]]}')
    assert layout_of({"files": DDP_FILES}, tmp_path) == Layout("DDP", 2, 1)
    files = {"global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt": {}}
    assert layout_of({"files": files}, tmp_path).kind == "ZeRO-2"


def test_sums_are_shared_out():
    """A log line averages the losses over ranks, and adds up predictions and tokens."""
    two = [[1.0, 2.0, 3], [3.0, 4.0, 5]]
    assert share_of_sums(two, 2) == two
    assert share_of_sums(two, 1) == [[2.0, 6.0, 8]]
    assert share_of_sums([[2.0, 6.0, 8]], 2) == [[2.0, 6.0, 8], [2.0, 0.0, 0]]
