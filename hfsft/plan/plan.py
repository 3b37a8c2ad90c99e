"""What a stage will need, memory, disk and time, before it runs and without its weights."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AttentionInterface, AutoConfig

from hfsft.errors import ModelError
from hfsft.hub.client import NOT_LOADED, require_model, why_not_loaded
from hfsft.model.attention import document_attention
from hfsft.model.loading import bf16_is_native, fresh_config
from hfsft.plan.sizes import most_checkpoints, optimizer_bytes
from hfsft.plan.spread import spread
from hfsft.plan.step_memory import (
    KINDS,
    PLANNED,
    TracedStep,
    count_parameters,
    empty_model,
    isolated,
    peaks_of,
    uses_checkpointing,
)
from hfsft.recipe.checks import check_tokens_per_step
from hfsft.recipe.schema import Recipe, Stage

# measured on an H100, torch 2.11, CUDA 13.0: the context and loaded kernels, outside torch's
# allocator, and two workspaces of cuBLAS, for the forward and the backward thread, within it
CUDA_CONTEXT = 760 * 2**20
CUDA_OVERHEAD = CUDA_CONTEXT + 64 * 2**20


# measured: resident memory after importing torch, transformers, trl, peft, bitsandbytes
CPU_OVERHEAD = 480 * 2**20


RTX_4060 = 30e12  # dense bf16 FLOP/s


UTILISATION = 0.35  # assumed: the share of that rate which a training step reaches


# measured on an H100 with d8 and the shape of SmolLM2-135M: seconds in which forward and backward
# of a layer launch their 190 kernels, whatever the micro-batch
LAYER_LAUNCH = 5e-3


# measured there with 4-bit weights: 0.869 s a step of SmolLM2-135M's shape and 0.7925 s of 1.1 B,
# 1.29 and 1.60 times what 16-bit weights are estimated to take; weights are unpacked in each layer
FOUR_BIT_LAUNCHES = 1.45


# assumed from two corpora, of people and of Alpaca: 16,512 of the 32 x 1,024 tokens that a step of
# conversations has room for, before they are packed
SFT_FILL = 0.5


@dataclass(frozen=True)
class Plan:
    """What a stage needs; sizes in bytes, the six kinds of memory at the moment of the peak."""

    stage: str
    device: str  # cuda or cpu
    processes: int  # sizes are of one of them
    layout: str  # DDP, ZeRO-2 or FSDP2
    seconds_sent: float  # of a step's gradients over PCIe, if nothing hides them
    precision: str  # bf16, fp16 or fp32
    rows: int  # of a micro-batch
    length: int  # tokens per row
    optim: str
    checkpointing: bool
    layers: int
    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    head: int
    overhead: int  # a constant, not traced
    phase: str  # of the step, in which the peak is
    phases: dict[str, int]  # the peak in each
    limit: int | None
    steps: int | None  # None: given by num_train_epochs and the data
    tokens_per_step: int  # at most
    flops_per_step: int  # of these
    disk: int
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The sum of all kinds and the overhead."""
        return sum(getattr(self, kind) for kind in KINDS) + self.overhead

    @property
    def headroom(self) -> int | None:
        """Bytes between peak and limit; negative where it does not fit."""
        return None if self.limit is None else self.limit - self.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.limit is None or self.peak <= self.limit

    def as_data(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self) | {"peak": self.peak, "headroom": self.headroom, "fits": self.fits}


def plan_stage(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> Plan:
    """Plan a stage.

    Args:
        recipe: whose stage.
        stage: without `auto` values; see `choose`.
        limit_bytes: of memory; None: `memory_limit`, and no more than the device has.
        device_type: cuda or cpu; None: cuda where a GPU is.

    Raises:
        RecipeError, ModelError: as the stage itself would.
    """
    device = device_type or ("cuda" if has_gpu(stage) else "cpu")
    if limit_bytes is None:
        limit_bytes = limit_of(stage, device)
    step = planned_step(recipe, stage, device == "cuda")
    parameters, trained = count_parameters(step)
    gathered = _gathered(step, parameters)
    peaks = {name: spread().own(kinds, gathered) for name, kinds in peaks_of(step).items()}
    phase, highest = max(peaks.items(), key=lambda item: sum(item[1].values()))
    settings = stage.trainer
    return Plan(
        stage=stage.name,
        device=device,
        processes=spread().processes,
        layout=spread().kind,
        seconds_sent=spread().seconds_sent(trained),
        precision={"bfloat16": "bf16", "float16": "fp16", None: "fp32"}[step.half],
        rows=step.rows,
        length=step.length,
        optim=settings.get("optim", "adamw_torch_fused"),
        checkpointing=uses_checkpointing(stage),
        layers=step.config.get_text_config().num_hidden_layers,
        parameters=parameters,
        trained_parameters=trained,
        **highest,
        overhead=CUDA_OVERHEAD if step.cuda else CPU_OVERHEAD,
        phase=phase,
        phases={name: sum(kinds.values()) for name, kinds in peaks.items()},
        limit=limit_bytes,
        steps=stage.max_steps,
        tokens_per_step=examples_of_step(recipe, stage) * step.length,
        flops_per_step=examples_of_step(recipe, stage) * step.length * _token_flops(step),
        disk=_disk(step, parameters, trained),
        notes=tuple(_notes(step)),
    )


def has_gpu(stage: Stage) -> bool:
    """Whether the stage would train on a GPU here."""
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return torch.cuda.is_available() and not (wanted or stage.trainer.get("use_cpu"))


def limit_of(stage: Stage, device: str) -> int | None:
    """`memory_limit`, or what a device has for this process if less; None for no such device.

    Other processes, such as a desktop, hold some of a card. What this one holds is in the plan:
    torch's part, and the context, which exists by now and is counted in full.
    """
    own = [stage.memory_limit_bytes] if stage.memory_limit is not None else []
    if device == "cpu":
        own.append(psutil.virtual_memory().total)
    elif torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        own.append(min(total, free + torch.cuda.memory_reserved() + CUDA_CONTEXT))
    return min(own, default=None)


def planned_step(recipe: Recipe, stage: Stage, cuda: bool) -> TracedStep:
    """The step of a stage on a device."""
    length = row_length(recipe, stage)
    rows = stage.trainer["per_device_train_batch_size"]
    processes = spread().processes
    share = examples_per_rank(recipe, stage)
    config = planned_config(recipe, stage)
    builds = stage.name == "base"
    attention = (recipe.model if builds else vars(stage)).get("attn_implementation")
    half = None
    if stage.trainer.get("fp16"):
        half = "float16"
    elif stage.trainer.get("bf16"):
        half = "bfloat16"
    elif cuda and stage.trainer.get("bf16") is None and stage.trainer.get("fp16") is None:
        here = torch.cuda.is_available()
        half = "bfloat16" if not here or bf16_is_native() else "float16"
    keys = ("optim", "optim_args", "activation_checkpointing_kwargs")
    settings = [
        config.to_json_string(),
        [stage.trainer.get(key) for key in keys],
        [stage.lora, stage.load_in_4bit, stage.dtype, attention],
        [processes, uses_checkpointing(stage)],
    ]
    eval_rows = stage.trainer.get("per_device_eval_batch_size", 8)
    return TracedStep(
        stage=stage,
        config=config,
        rows=min(rows, share),
        eval_rows=eval_rows if stage.validates else 0,
        length=length,
        cuda=cuda,
        half=half,
        accumulates=share > rows,
        attention=attention,
        settings=json.dumps(settings),
    )


def row_length(recipe: Recipe, stage: Stage) -> int:
    """Tokens of a stage's longest row."""
    return stage.max_length or recipe.model.get("max_position_embeddings") or 2048


def examples_of_step(recipe: Recipe, stage: Stage) -> int:
    """Rows of an optimizer step on all ranks; for sft at most: one conversation per row."""
    if stage.name == "sft":
        return stage.examples_per_step
    if stage.tokens_per_step is None:
        return stage.trainer["per_device_train_batch_size"] * spread().processes
    length = row_length(recipe, stage)
    return check_tokens_per_step(stage.name, stage.tokens_per_step, length, 1, recipe.path)


def examples_per_rank(recipe: Recipe, stage: Stage) -> int:
    """`examples_of_step` of one rank, rounded up."""
    return -(-examples_of_step(recipe, stage) // spread().processes)


def planned_config(recipe: Recipe, stage: Stage) -> Any:
    """The configuration of the model that a stage trains, even if it is not trained yet.

    Raises:
        RecipeError: if base's model cannot be built.
        ModelError: if there is no such model.
    """
    if stage.name == "base":
        return fresh_config(recipe, _vocab_size(recipe))
    start = stage.model_name_or_path
    path = Path(start)
    if not path.is_dir() and path.parent == recipe.folder and path.name in recipe.stages:
        return planned_config(recipe, recipe.stages[path.name])
    require_model(start, stage.revision)
    try:
        return AutoConfig.from_pretrained(
            start, revision=stage.revision, trust_remote_code=stage.trust_remote_code
        )
    except NOT_LOADED as error:
        raise ModelError(f"{start}: cannot be planned: {why_not_loaded(error)}") from None


def _vocab_size(recipe: Recipe) -> int:
    size = recipe.model.get("vocab_size") or recipe.tokenizer.get("vocab_size")
    if size:
        return size
    from hfsft.tokens.tokenizer import new_tokenizer

    return len(new_tokenizer(recipe, ()))


AttentionInterface.register(PLANNED, document_attention)  # for models that only count


@cache
def _token_flops(step: TracedStep) -> int:
    """FLOPs of forward and backward on one token of a full row (Kaplan et al. 2020)."""
    text = step.config.get_text_config()
    parameters, trained = count_parameters(step)
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    forward = 2 * (parameters - looked_up)
    attention = 2 * text.num_hidden_layers * text.hidden_size * step.length  # causal: half
    recomputed = forward + attention if uses_checkpointing(step.stage) else 0
    return 2 * forward + 2 * min(trained, parameters - looked_up) + 3 * attention + recomputed


def estimated_seconds(plan: Plan, stage: Stage, fill: float = 1.0) -> float:
    """Seconds of a process' share of a step: arithmetic, or kernel launches if more.

    A recomputed layer launches half as many kernels again, and one with an adapter too.

    Args:
        plan: of the stage.
        stage: as planned.
        fill: the share of the step's most tokens that it has.
    """
    rate = UTILISATION * matmul_rate(plan.device, plan.precision)
    arithmetic = fill * plan.flops_per_step / plan.processes / rate
    if plan.device != "cuda":
        return arithmetic
    tokens = fill * plan.tokens_per_step / plan.processes
    launches = LAYER_LAUNCH * plan.layers * math.ceil(tokens / (plan.rows * plan.length))
    launches *= 1.5 if plan.checkpointing else 1
    launches *= 1.5 if stage.lora is not None else 1
    return max(arithmetic, launches * (FOUR_BIT_LAUNCHES if stage.load_in_4bit else 1))


@cache
def matmul_rate(device: str, precision: str) -> float:
    """FLOP/s of a large matmul, measured; an RTX 4060's for a card that is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        return RTX_4060
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 4096 if device == "cuda" else 512
    # products of ones draw less power, and a card at its power limit would clock higher
    chance = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, dtype=dtype, device=device, generator=chance)
    matrix @ matrix  # the first one initialises the library
    count, began, seconds = 0, time.perf_counter(), 0.0
    each = 20 if device == "cuda" else 1  # a product takes 0.2 ms there, about as long as a wait
    while seconds < 0.2:
        for _ in range(each):
            matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        count, seconds = count + each, time.perf_counter() - began
    return count * 2 * size**3 / seconds


def _gathered(step: TracedStep, parameters: int) -> int:
    """Bytes that FSDP2 keeps whole: embedding and head, and two layers, one of them ahead."""
    text = step.config.get_text_config()
    outside = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    return 4 * (outside + 2 * (parameters - outside) // max(1, step.layers))


def _disk(step: TracedStep, parameters: int, trained: int) -> int:
    """Bytes of a stage's checkpoints, with the one being written, and of its finished model."""
    stage, settings = step.stage, step.stage.trainer
    count = most_checkpoints(settings, stage.max_steps)
    saved = trained if stage.lora is not None else parameters
    state = peaks_of(step)["optimizer step"]["optimizer"]
    optim = str(settings.get("optim"))
    if optim.startswith("paged"):  # most of its states are not among what is traced
        with isolated():
            state = optimizer_bytes(empty_model(step, step.layers)[0], optim)
    final = 4 * parameters + (4 * trained if stage.lora is not None else 0)
    return count * (4 * saved + state) + final


def _notes(step: TracedStep) -> Iterator[str]:
    if step.cuda:
        yield f"{gigabytes(CUDA_OVERHEAD)} of runtime overhead were measured on an H100"
        if not torch.cuda.is_available():
            yield "no CUDA GPU on this machine: times assume an RTX 4060 at 30 TFLOP/s"
    if spread().processes > 1:
        yield (
            f"{spread().processes} processes by formula, not measured: their gradients are sent at "
            "an assumed 12 GB/s (PCIe), and no computation hides it"
        )
    if step.stage.load_in_4bit:
        yield "4-bit weights are by formula, not traced"
    if step.stage.trainer.get("torch_compile"):
        yield "compiled layers are not traced: those of a d8 took 20% more memory on an H100"
    if str(step.stage.trainer.get("optim")).startswith("paged"):
        yield "paged optimizer states are counted as main memory"


def gigabytes(size: float) -> str:
    """Bytes in gigabytes, for a person."""
    return f"{size / 1e9:.2f} GB"
