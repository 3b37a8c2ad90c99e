"""The layout of a run: processes, machines, and what is sharded; as asked for, as it is, as saved.

Accelerate starts one process, or trains with DDP, where it cannot do what it was asked for, and
says nothing. Here that is an error.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from hfsft.errors import CheckpointError, RecipeError
from hfsft.process_group import machines
from hfsft.recipe.schema import Stage

DDP = "DDP"
# files of a checkpoint, one of each group at least, without which a layout cannot resume
OPTIMIZER_FILES = {DDP: "optimizer.pt", "FSDP": "optimizer", "ZeRO": "optim_states.pt"}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes."""

    kind: str  # DDP (also of one process), FSDP1, FSDP2, ZeRO-0 to ZeRO-3
    processes: int
    machines: int

    def __str__(self) -> str:
        kind = self.kind if self.processes > 1 or self.kind != DDP else ""
        return ", ".join(
            filter(
                None,
                [
                    f"{self.processes} process{'es' * (self.processes > 1)} on "
                    f"{self.machines} machine{'s' * (self.machines > 1)}",
                    kind,
                ],
            )
        )

    def as_data(self) -> dict[str, Any]:
        """The layout as plain data, for a checkpoint's manifest."""
        return asdict(self)


# --- asked for, and as it is ---


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def asks_for_sharding() -> bool:
    """Whether Accelerate was configured to shard, by FSDP or DeepSpeed."""
    return _is_set("ACCELERATE_USE_FSDP") or uses_deepspeed()


def uses_deepspeed() -> bool:
    """Whether Accelerate was configured to train with DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def active_layout(accelerator: Any) -> Layout:
    """The layout that an `Accelerator` really has."""
    kind = DDP
    if accelerator.distributed_type == DistributedType.FSDP:
        kind = f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        kind = f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return Layout(kind, accelerator.num_processes, machines())


def require_layout(stage: Stage, cpu: bool) -> Layout:
    """Check that the processes and the sharding that were asked for are what runs.

    Args:
        stage: about to train.
        cpu: whether it trains on the CPU.

    Returns:
        The layout.

    Raises:
        RecipeError: if they are not, with the reason and the fix.
    """
    state = PartialState()
    if state.num_processes == 1:
        _require_no_others(stage)
    if not asks_for_sharding():
        return Layout(DDP, state.num_processes, machines())
    try:
        # the trainer makes its own; no precision, which fails on some devices
        layout = active_layout(Accelerator(cpu=cpu, mixed_precision="no"))
    except ImportError:
        raise _deepspeed_is_missing(stage) from None
    asked = "DeepSpeed" if uses_deepspeed() else "FSDP"
    if layout.kind == DDP:
        where = "on the CPU Accelerate trains with DDP" if cpu else "Accelerate trains without it"
        raise RecipeError(
            f"{stage.name}: {asked} was asked for, but {where}\n"
            f"  hfsft {stage.name} RECIPE --config_file multi_gpu --num_processes "
            f"{max(2, state.num_processes)} is DDP"
        )
    if layout.kind == "ZeRO-3":
        raise RecipeError(
            f"{stage.name}: DeepSpeed's ZeRO-3 gathers weights module by module, which hfsft's "
            "fused head does not\n  FSDP2 shards the same: --config_file fsdp2"
        )
    return layout


def require_shardable(stage: Stage) -> None:
    """Check that the optimizer works on sharded weights, where FSDP was asked for.

    Args:
        stage: with a value for every `auto`.

    Raises:
        RecipeError: for bitsandbytes' optimizers, which fail on a DTensor in the first step.
    """
    optim = str(stage.trainer.get("optim", ""))
    ours = optim.startswith("adamw_torch") or not any(
        word in optim for word in ("bnb", "8bit", "paged")
    )
    if asks_for_sharding() and not uses_deepspeed() and not ours:
        raise RecipeError(
            f"{stage.name}.optim: {optim} is of bitsandbytes, which FSDP2 cannot shard\n"
            "  --optim adamw_torch_fused does, and adamw_torch_8bit in 8 bits (torchao)"
        )


def _deepspeed_is_missing(stage: Stage) -> RecipeError:
    return RecipeError(
        f"{stage.name}: DeepSpeed was asked for and is not installed\n"
        "  pip install 'hfsft[deepspeed]', or shard with --config_file fsdp2"
    )


def _require_no_others(stage: Stage) -> None:
    """Refuse to be the only process where the environment speaks of several."""
    env = os.environ
    reason = None
    if int(env.get("WORLD_SIZE") or 1) > 1:
        reason = f"WORLD_SIZE is {env['WORLD_SIZE']}"
    elif "MASTER_ADDR" in env and not {"RANK", "LOCAL_RANK", "PMI_RANK"} & env.keys():
        # what `accelerate launch --cpu --num_processes 2` sets, and all that it does
        reason = "MASTER_ADDR is set, as accelerate launch does for several"
    elif int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "LOCAL_RANK" not in env:
        reason = f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks"
    if reason:
        raise RecipeError(
            f"{stage.name}: several processes were asked for ({reason}), but this one trains "
            f"alone\n  hfsft {stage.name} RECIPE --num_processes N starts N, also on the CPU "
            "(ACCELERATE_USE_CPU=true); on a cluster start torchrun, as in cluster/"
        )


# --- of a checkpoint ---


def layout_of(manifest: dict[str, Any], checkpoint: Path) -> Layout:
    """The layout that a checkpoint was written in.

    Args:
        manifest: the checkpoint's.
        checkpoint: read only where the manifest has no layout, as before hfsft kept it there.
    """
    if "layout" in manifest:
        return Layout(**manifest["layout"])
    files = manifest["files"]
    kind = DDP
    if any(name.startswith("pytorch_model_fsdp") for name in files):
        kind = "FSDP2"
    elif any("optim_states.pt" in name for name in files):
        kind = "ZeRO-2"
    return Layout(kind, len(json.loads((checkpoint / "place.json").read_text())["sums"]), 1)


def check_resumable(checkpoint: Path, manifest: dict[str, Any], now: Layout) -> None:
    """Check that a checkpoint has its optimizer's states and can be loaded into a layout.

    DDP's is the same for any number of processes. FSDP2's and DeepSpeed's are loaded into what they
    were written in alone: what they hold is named and cut differently.

    Args:
        checkpoint: the folder.
        manifest: its own, verified.
        now: the layout of the process that resumes.

    Raises:
        CheckpointError: if not, with what to do.
    """
    then = layout_of(manifest, checkpoint)
    states = OPTIMIZER_FILES[then.kind[:4].removesuffix("2").removesuffix("1")]
    if not any(states in name for name in manifest["files"]):
        raise CheckpointError(
            f"{checkpoint}: has no states of the optimizer, without which nothing resumes\n"
            "  Start over with --restart, or from its weights: --model_name_or_path, --name"
        )
    same = (then.kind, then.processes) == (now.kind, now.processes)
    if same or then.kind == now.kind == DDP:
        return
    raise CheckpointError(
        f"{checkpoint} was written by {then}, and this is {now}\n"
        f"  Resume it with {then.processes} processes and {then.kind}, or pass --restart, which "
        "moves the old stage aside"
    )
