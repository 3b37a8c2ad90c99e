"""Checks of a stage: tiny runs, interrupted and short of memory, and a checkpoint's disk."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from hfsft.doctor.findings import CheckFailed, NotHere
from hfsft.doctor.step_checks import difference, tiny_model, training_device

CHECKPOINT_BYTES = 64 * 2**20


def write_recipe(folder: Path) -> None:
    """A tiny model, its tokenizer and a recipe that fine-tunes it for two steps."""
    from hfsft.data.tasks import facts
    from hfsft.tokens.tokenizer import train_tokenizer

    tiny_model(width=128).cpu().save_pretrained(folder / "model")
    train_tokenizer(facts(), 512).save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(
        f"name: doctor\noutput_dir: {folder / 'runs'}\n"
        "sft:\n"
        f"  model_name_or_path: {folder / 'model'}\n"
        "  data: [identity]\n"
        "  held_out: 0\n"
        "  examples_per_step: 32\n"
        "  per_device_train_batch_size: 16\n"
        "  max_length: 256\n"
        "  max_steps: 4\n"
        "  save_steps: 2\n"
        "  gradient_checkpointing: false\n"
        "  lr_scheduler_type: constant\n"
    )


def train_tiny(folder: Path, name: str, *arguments: str) -> Any:
    """The weights after a run of the recipe, flattened."""
    import torch
    from safetensors.torch import load_file

    from hfsft import sft

    sft.main(str(folder / "recipe.yaml"), "--quiet", "--name", name, *arguments)
    weights = load_file(folder / "runs" / name / "sft" / "model.safetensors")
    return torch.cat([weights[key].flatten().float() for key in sorted(weights)])


def resume() -> str:
    """Weights of a resumed run beside those of an uninterrupted one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_recipe(folder)
        whole, again = train_tiny(folder, "whole"), train_tiny(folder, "again")
        train_tiny(folder, "resumed", "--max_steps", "2")
        resumed = train_tiny(folder, "resumed")
    noise, error = difference(again, whole), difference(resumed, whole)
    if error and not error <= 2 * noise:
        raise CheckFailed(
            f"weights differ by {error:.1e}, two equal runs by {noise:.1e}",
            "a bug: please report it",
        )
    if noise:
        return f"weights within {error:.1e}, as two equal runs on this device ({noise:.1e})"
    return "the same bits as without an interruption"


def four_bit_weights() -> str:
    """A run of QLoRA, whose loss must fall."""
    if training_device().type != "cuda":
        raise NotHere("QLoRA needs a CUDA GPU")
    settings = "--load_in_4bit true --lora.r 8 --max_steps 10 --learning_rate 1e-2"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_recipe(folder)
        train_tiny(folder, "qlora", *settings.split(), "--logging_steps", "1")
        log = (folder / "runs" / "qlora" / "sft" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, log) if "loss" in line]
    if not losses[-1] < losses[0]:
        raise CheckFailed(
            f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}", "use lora only"
        )
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in ten steps of QLoRA"


def out_of_memory() -> str:
    """A run that exceeds its memory_limit beside one that does not."""
    import torch

    if training_device().type != "cuda":
        raise NotHere("a memory_limit is enforced on a CUDA GPU alone")
    from hfsft.plan.plan import CUDA_CONTEXT

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_recipe(folder)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_reserved()
        whole, again = train_tiny(folder, "whole"), train_tiny(folder, "again")
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        limit = (held + peak) // 2 + CUDA_CONTEXT
        try:
            capped = train_tiny(
                folder, "capped", "--memory_limit", f"{limit / 1e9:.4f}GB", "--ignore_plan"
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        record = (folder / "runs" / "capped" / "sft" / "stage.json").read_text()
    rows = json.loads(record)["micro_batch_rows"]
    noise, error = difference(again, whole), difference(capped, whole)
    if rows == 16:
        raise CheckFailed(f"memory never ran out at {limit:,} bytes", "memory_limit has no effect")
    if not error < max(1e-3, 10 * noise):
        raise CheckFailed(f"weights differ by {error:.1e}", "set per_device_train_batch_size: 1")
    return f"16 rows became {rows}, weights within {error:.1e} (two equal runs: {noise:.1e})"


def disk() -> str:
    """Write and verify a checkpoint in this folder."""
    from hfsft.run.manifest import commit, verify

    with tempfile.TemporaryDirectory(dir=".", prefix=".hfsft-doctor-") as folder:
        partial, final = Path(folder) / "partial", Path(folder) / "checkpoint-1"
        partial.mkdir()
        began = time.perf_counter()
        (partial / "model.safetensors").write_bytes(os.urandom(2**20) * (CHECKPOINT_BYTES // 2**20))
        commit(partial, final, {"step": 1})
        written = time.perf_counter()
        verify(final)
        read = time.perf_counter()
    megabytes = CHECKPOINT_BYTES / 1e6
    return (
        f"a checkpoint is written at {megabytes / (written - began):,.0f} MB/s and verified at "
        f"{megabytes / (read - written):,.0f} MB/s"
    )
