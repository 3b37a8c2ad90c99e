"""What a stage was and what it took: the figures of its `stage.json`."""

import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.manifest import checkpoints
from hfsft.run.record import read_record, settings_of

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes")


def new_record(trainer: Any, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """A stage's record as it starts: settings, versions, device, lineage."""
    start = read_record(Path(stage.model_name_or_path)) if stage.model_name_or_path else None
    earlier = read_record(stage.folder) if checkpoints(stage.checkpoints) else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "stage": stage.name,
        "status": "running",
        # a resumed stage is the same one to the stages that start from it
        "started": (earlier or {}).get("started", now),
        "max_steps": trainer.args.max_steps,
        "examples_per_step": trainer.get_total_train_batch_size(trainer.args),
        "device": _device_name(trainer.args.device),
        "processes": trainer.args.world_size,
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": {name: version(name) for name in ("hfsft", *LIBRARIES)},
        "recipe": recipe.path,
        "command": shlex.join(["hfsft", stage.name, recipe.path, *_repeatable(recipe.arguments)]),
        "settings": settings_of(recipe, stage),
        "chosen": stage.chosen,
        "plan": stage.plan,
        "lineage": {
            "model": stage.model_name_or_path,
            "revision": stage.revision,
            "stage": start and {key: start.get(key) for key in ("stage", "steps", "lineage")},
        },
    }


def _repeatable(arguments: tuple[str, ...]) -> list[str]:
    """A command line without `--restart`, which would discard what is to be resumed."""
    kept: list[str] = []
    for index, word in enumerate(arguments):
        value = index > 0 and arguments[index - 1] == "--restart" and not word.startswith("--")
        if not value and word.partition("=")[0] != "--restart":
            kept.append(word)
    return kept


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def figures(trainer: Any) -> dict[str, Any]:
    """The figures of a stage as far as it came, from the trainer's state and log."""
    log, state = trainer.metrics_log, trainer.state
    losses, validation = log.values("loss"), log.values("eval_loss")
    return {
        "steps": state.global_step,
        "micro_batch_rows": trainer.rows,
        "examples": state.global_step * trainer.get_total_train_batch_size(trainer.args),
        "tokens": state.num_input_tokens_seen,
        "seconds": round(log.seconds(), 1) if log.began else 0.0,
        "train_loss": losses[-1] if losses else None,
        "eval_loss": validation[-1] if validation else None,
        "eval_loss_before": validation[0] if validation else None,
        "eval_seconds": round(sum(log.values("eval_seconds")), 1),
        "stopped_at": "plateau" if trainer.is_at_plateau() else None,
    }


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The peak memory of this process: of the GPU as reserved and as allocated, else resident."""
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_reserved(),
            "peak_memory_of": "GPU reserved",
            # what the plan without its overhead is compared to
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        }
    return {
        "peak_memory_bytes": _peak_resident(),
        "peak_memory_of": "process",
        "peak_allocated_bytes": None,
    }


def _peak_resident() -> int:
    """The most bytes of main memory that this process has held."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def joules(device: torch.device) -> float | None:
    """Joules that a GPU has used since its driver was loaded; None where it does not count them."""
    if device.type != "cuda":
        return None
    import pynvml

    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:  # not supported, as by GeForce cards, or no NVML, as under WSL
        return None
