"""What a stage will need: memory, disk and steps, before it runs and without its weights."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig

from hfsft.attention import document_attention
from hfsft.disk import most_checkpoints
from hfsft.errors import MemoryShortage, ModelError, first_line
from hfsft.hub import require_model
from hfsft.keys import AUTO, RENAMED
from hfsft.model import bf16_is_native, fresh_config
from hfsft.recipe import STAGE_FIELDS, Recipe, Stage, check_tokens_per_step
from hfsft.traced import (
    KINDS,
    PLANNED,
    TracedStep,
    count_parameters,
    peaks_of,
    uses_checkpointing,
)

# assumed, not measured: the context, kernels, cuBLAS workspaces and fragmentation of a CUDA card
CUDA_OVERHEAD = 600 * 2**20
# measured here: what a process holds after importing torch, transformers, trl, peft, bitsandbytes
CPU_OVERHEAD = 480 * 2**20
RTX_4060 = 30e12  # its dense bf16 operations a second
UTILISATION = 0.35  # assumed: the part of that rate which a training step reaches
BUSY_TOKENS = 4096  # assumed: below so many a micro-batch leaves a GPU waiting for its launches
MARGIN = 0.95  # of the limit is what `auto` may plan to take: the plan is good to some percent
OPTIMIZERS = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")  # by bytes a parameter
LORA = {"r": 16}  # what is proposed


@dataclass(frozen=True)
class Plan:
    """What a stage needs; sizes in bytes, the six kinds at the moment of the peak."""

    stage: str
    device: str  # cuda or cpu
    precision: str  # bf16, fp16 or fp32
    rows: int  # of a micro-batch
    length: int  # tokens a row
    optim: str
    checkpointing: bool
    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    head: int
    overhead: int  # stated, not traced
    phase: str  # of the step, where its peak is
    phases: dict[str, int]  # the peak of each
    limit: int | None
    steps: int | None  # None: an epoch's, which the data decides
    tokens_per_step: int  # at most
    flops_per_step: int  # of these
    disk: int
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """All kinds and the overhead together."""
        return sum(getattr(self, kind) for kind in KINDS) + self.overhead

    @property
    def headroom(self) -> int | None:
        """What is left below the limit; negative where it does not fit."""
        return None if self.limit is None else self.limit - self.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.limit is None or self.peak <= self.limit

    def as_data(self) -> dict[str, Any]:
        """The plan for a program."""
        return asdict(self) | {"peak": self.peak, "headroom": self.headroom, "fits": self.fits}


def plan_stage(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> Plan:
    """What a stage will need.

    Args:
        recipe: whose stage.
        stage: without `auto` values; see `choose`.
        limit_bytes: of memory; None: `memory_limit`, and no more than the device has.
        device_type: cuda or cpu; None: cuda where a GPU is.

    Raises:
        RecipeError, ModelError: as the stage itself would.
    """
    device = device_type or ("cuda" if _has_gpu(stage) else "cpu")
    if limit_bytes is None:
        limit_bytes = _limit(stage, device)
    step = planned_step(recipe, stage, device == "cuda")
    peaks = peaks_of(step)
    phase, highest = max(peaks.items(), key=lambda item: sum(item[1].values()))
    parameters, trained = count_parameters(step)
    settings = stage.trainer
    return Plan(
        stage=stage.name,
        device=device,
        precision={"bfloat16": "bf16", "float16": "fp16", None: "fp32"}[step.half],
        rows=step.rows,
        length=step.length,
        optim=settings.get("optim", "adamw_torch_fused"),
        checkpointing=uses_checkpointing(stage),
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
        disk=_disk(stage, peaks["optimizer step"], parameters, trained),
        notes=tuple(_notes(step)),
    )


def _has_gpu(stage: Stage) -> bool:
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return torch.cuda.is_available() and not (wanted or stage.trainer.get("use_cpu"))


def _limit(stage: Stage, device: str) -> int | None:
    """`memory_limit`, or the device's memory where that is less; None for a card elsewhere."""
    own = [stage.memory_limit_bytes] if stage.memory_limit is not None else []
    if device == "cpu":
        own.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    elif torch.cuda.is_available():
        own.append(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return min(own, default=None)


def planned_step(recipe: Recipe, stage: Stage, cuda: bool) -> TracedStep:
    """The step that a stage makes on a device."""
    length = row_length(recipe, stage)
    rows = stage.trainer["per_device_train_batch_size"]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = -(-examples_of_step(recipe, stage) // processes)
    config = planned_config(recipe, stage)
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
        [stage.lora, stage.load_in_4bit, stage.dtype, stage.attn_implementation],
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
        settings=json.dumps(settings),
    )


def row_length(recipe: Recipe, stage: Stage) -> int:
    """Tokens of a stage's longest row."""
    return stage.max_length or recipe.model.get("max_position_embeddings") or 2048


def examples_of_step(recipe: Recipe, stage: Stage) -> int:
    """Rows of an optimizer step on all devices; of sft, each conversation in one of its own."""
    if stage.name == "sft":
        return stage.examples_per_step
    if stage.tokens_per_step is None:
        return stage.trainer["per_device_train_batch_size"] * int(os.environ.get("WORLD_SIZE", 1))
    length = row_length(recipe, stage)
    return check_tokens_per_step(stage.name, stage.tokens_per_step, length, 1, recipe.path)


def planned_config(recipe: Recipe, stage: Stage) -> Any:
    """The configuration of the model that a stage trains, also where it is not trained yet.

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
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{start}: cannot be planned: {first_line(error)}") from None


def _vocab_size(recipe: Recipe) -> int:
    size = recipe.model.get("vocab_size") or recipe.tokenizer.get("vocab_size")
    if size:
        return size
    from hfsft.tokenizer import new_tokenizer

    return len(new_tokenizer(recipe, ()))


AttentionInterface.register(PLANNED, document_attention)  # for a model that only counts


@cache
def _token_flops(step: TracedStep) -> int:
    """Operations of forward and backward on one token of a full row (Kaplan et al. 2020)."""
    text = step.config.get_text_config()
    parameters, trained = count_parameters(step)
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    forward = 2 * (parameters - looked_up)
    attention = 2 * text.num_hidden_layers * text.hidden_size * step.length  # half of it is masked
    again = forward + attention if uses_checkpointing(step.stage) else 0
    return 2 * forward + 2 * min(trained, parameters - looked_up) + 3 * attention + again


@cache
def _rate(device: str, precision: str) -> float:
    """Operations a second of a large product: an RTX 4060's where no such device is here."""
    if device == "cuda" and not torch.cuda.is_available():
        return RTX_4060
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 4096 if device == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    matrix @ matrix  # the first one sets the library up
    count, began, seconds = 0, time.perf_counter(), 0.0
    while seconds < 0.2:
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        count, seconds = count + 1, time.perf_counter() - began
    return count * 2 * size**3 / seconds


def _disk(stage: Stage, update: dict[str, int], parameters: int, trained: int) -> int:
    """Bytes of a stage's checkpoints, the one being written too, and of its finished model."""
    settings = stage.trainer
    count = most_checkpoints(settings, stage.max_steps)
    saved = trained if stage.lora is not None else parameters
    state = update["optimizer"]
    if str(settings.get("optim")).startswith("paged"):
        state += 2 * trained * (1 if "8bit" in settings["optim"] else 4)
    final = 4 * parameters + (4 * trained if stage.lora is not None else 0)
    return count * (4 * saved + state) + final


def _notes(step: TracedStep) -> Iterator[str]:
    if step.cuda:
        yield f"{_gb(CUDA_OVERHEAD)} of runtime overhead are assumed, not measured"
        if not torch.cuda.is_available():
            yield "no such card is here: seconds are an RTX 4060's at 30 TFLOP/s"
    if step.stage.load_in_4bit:
        yield "4-bit weights are by formula, not traced"
    if str(step.stage.trainer.get("optim")).startswith("paged"):
        yield "paged optimizer states are counted in main memory"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# --- settings that fit ---


def with_settings(stage: Stage, **changes: Any) -> Stage:
    """A stage with other settings, by the keys of a recipe."""
    own = {key: value for key, value in changes.items() if key in STAGE_FIELDS}
    upstream = {RENAMED.get(key, key): changes[key] for key in changes.keys() - own.keys()}
    return replace(stage, trainer=stage.trainer | upstream, **own)


def nearest_settings(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> list[tuple[dict[str, Any], Plan]]:
    """The nearest settings that fit where a stage does not.

    Args:
        recipe: as `plan_stage` takes it; and the rest.

    Returns:
        Changed settings by the recipe's keys, each with its own plan: those that suffice alone, or
        else the fewest together, or nothing.
    """

    def plan(changes: dict[str, Any]) -> Plan:
        return plan_stage(recipe, with_settings(stage, **changes), limit_bytes, device_type)

    def largest(key: str, values: list[int]) -> list[dict[str, Any]]:
        best = _largest(values, lambda value: plan({key: value}).fits)
        return [] if best is None else [{key: best}]

    now = plan({})
    halves = [now.length >> by for by in range(6, 0, -1) if now.length >> by >= 64]
    lengths = list(range(64, now.length, 64)) if stage.name == "sft" else halves
    smaller = [{"optim": optim} for optim in _smaller_optimizers(now)]
    checkpointing = [] if now.checkpointing else [{"gradient_checkpointing": True}]
    adapter = [{"lora": LORA}] if stage.name != "base" and stage.lora is None else []
    rows = list(range(1, now.rows)) if _may_cut_rows(stage) else []
    alone = [*largest("per_device_train_batch_size", rows), *checkpointing, *smaller, *adapter]
    found = [(changes, plan(changes)) for changes in [*alone, *largest("max_length", lengths)]]
    found = [(changes, its_plan) for changes, its_plan in found if its_plan.fits]
    if found:
        return found
    together: dict[str, Any] = {}
    for changes in [{"per_device_train_batch_size": 1}] * bool(rows) + alone:
        together |= changes
        if (its_plan := plan(together)).fits:
            return [(together, its_plan)]
    best = _largest(lengths, lambda length: plan(together | {"max_length": length}).fits)
    if best is None:
        return []
    together["max_length"] = best
    return [(together, plan(together))]


def _smaller_optimizers(plan: Plan) -> tuple[str, ...]:
    after = OPTIMIZERS.index(plan.optim) + 1 if plan.optim in OPTIMIZERS else 1
    return OPTIMIZERS[after:] if plan.device == "cuda" else OPTIMIZERS[after:2]


def _may_cut_rows(stage: Stage) -> bool:
    """Whether a smaller micro-batch leaves the step as it is."""
    return stage.name == "sft" or stage.tokens_per_step is not None


def _largest(values: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending values that fits, or None; larger ones need more."""
    if not values or not fits(values[0]):
        return None
    low, high = 1, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1]


def choose(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> tuple[Stage, str]:
    """Settle a stage's `auto` values: the largest micro-batch and the cheapest settings that fit.

    What costs no time is given up first: 32-bit optimizer states, then stored activations, and only
    then a micro-batch of `BUSY_TOKENS`. The step's examples, and so its result, stay as they are.

    Args:
        recipe: as `plan_stage` takes it; and the rest.

    Returns:
        The stage with values in their place, and one sentence of what was chosen and why; an empty
        one where nothing was `auto`.
    """
    keys = ("per_device_train_batch_size", "activation_checkpointing", "optim")
    if AUTO not in [stage.trainer.get(key) for key in keys]:
        return stage, ""
    given_rows, given_checkpointing, given_optim = (stage.trainer.get(key) for key in keys)
    device = device_type or ("cuda" if _has_gpu(stage) else "cpu")
    limit = _limit(stage, device) if limit_bytes is None else limit_bytes
    optims = OPTIMIZERS if device == "cuda" else OPTIMIZERS[:2]
    settings = [
        {"activation_checkpointing": checkpointing, "optim": optim}
        for checkpointing in ((False, True) if given_checkpointing == AUTO else (None,))
        for optim in (optims if given_optim == AUTO else (None,))
    ]
    settings = [{k: v for k, v in item.items() if v is not None} for item in settings]
    settings.sort(key=lambda item: item.get("optim") == OPTIMIZERS[2])  # it may wait for the bus
    rows = [given_rows]
    if given_rows == AUTO:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        rows = list(range(1, -(-examples_of_step(recipe, stage) // processes) + 1))

    def plan(item: dict[str, Any], count: int) -> Plan:
        changed = with_settings(stage, per_device_train_batch_size=count, **item)
        return plan_stage(recipe, changed, limit and int(limit * MARGIN), device)

    enough = min(rows[-1], -(-BUSY_TOKENS // row_length(recipe, stage)))
    enough = rows[0] if given_rows != AUTO else enough
    chosen = next((item for item in settings if plan(item, enough).fits), settings[-1])
    best = _largest(rows, lambda count: plan(chosen, count).fits) or rows[0]
    its_plan = plan(chosen, best)
    told = {"per_device_train_batch_size": best} if given_rows == AUTO else {}
    told |= chosen
    why = f"{stage.name}: auto chose {_words(told)}, planned at {_gb(its_plan.peak)}"
    if limit is not None:
        why += f" of {_gb(limit)}"
    refused = _refused(plan, settings, chosen, best, rows, enough)
    return with_settings(stage, per_device_train_batch_size=best, **chosen), why + refused


def _refused(
    plan: Callable[[dict[str, Any], int], Plan],
    settings: list[dict[str, Any]],
    chosen: dict[str, Any],
    best: int,
    rows: list[int],
    enough: int,
) -> str:
    """The end of a sentence: the cheaper or larger choice that would not fit."""
    before = settings.index(chosen) - 1
    if before >= 0:
        return f"; {_words(settings[before])} would take {_gb(plan(settings[before], enough).peak)}"
    if best < rows[-1]:
        return f"; {best + 1} rows would take {_gb(plan(chosen, best + 1).peak)}"
    return "; it is the whole step at once" if len(rows) > 1 else ""


def _words(changes: dict[str, Any]) -> str:
    """Settings as the command line takes them."""
    words = []
    for key, value in changes.items():
        key = {new: old for old, new in RENAMED.items()}.get(key, key)
        if isinstance(value, dict):
            words += [f"--{key}.{name} {item}" for name, item in value.items()]
        else:
            words.append(f"--{key} {json.dumps(value) if isinstance(value, bool) else value}")
    return " ".join(words)


def require_fit(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> Plan:
    """Plan a stage, and refuse one that does not fit.

    Args:
        recipe: as `plan_stage` takes it; with `ignore_plan`, nothing is refused.

    Raises:
        MemoryShortage: with the sizes, and the nearest settings that fit.
    """
    plan = plan_stage(recipe, stage, limit_bytes, device_type)
    if plan.fits or recipe.ignore_plan:
        return plan
    sizes = ", ".join(f"{kind} {getattr(plan, kind) / 1e9:.2f}" for kind in (*KINDS, "overhead"))
    nearest = nearest_settings(recipe, stage, limit_bytes, device_type)
    fitting = [f"{_words(changes)} ({_gb(its_plan.peak)})" for changes, its_plan in nearest]
    raise MemoryShortage(
        f"{stage.name}: needs {_gb(plan.peak)} at its peak ({plan.phase}), "
        f"{_gb(-plan.headroom)} more than there is\n"
        f"  GB: {sizes}\n"
        f"  What fits: {'; '.join(fitting) or 'nothing near; take a smaller model'}\n"
        "  --ignore_plan starts it all the same"
    )


# --- a run's plan ---


def plan_run(
    recipe: Recipe,
    memory: int | None = None,
    time_step: Callable[[Recipe, Stage], float] | None = None,
) -> dict[str, Any]:
    """Plan every stage of a run, one after the other.

    Args:
        recipe: whose stages, `auto` values included.
        memory: bytes of a CUDA card to plan for; None: this machine's device.
        time_step: measures the seconds of a step; None: they come from its operations.

    Returns:
        `stages`: name → `Plan.as_data`, `auto` (what was chosen) and `nearest` (where it does not
        fit), `seconds_per_step`, at most, and whether it was `timed`; `disk`: bytes of all.

    Raises:
        RecipeError, ModelError: as the stages themselves would.
    """
    stages = {}
    for name, stage in recipe.stages.items():
        device, limit = None if memory is None else "cuda", memory
        if memory is not None and stage.memory_limit is not None:
            limit = min(memory, stage.memory_limit_bytes)
        stage, why = choose(recipe, stage, limit, device)
        plan = plan_stage(recipe, stage, limit, device)
        nearest = [] if plan.fits else nearest_settings(recipe, stage, limit, device)
        other = with_settings(stage, gradient_checkpointing=not plan.checkpointing)
        stages[name] = plan.as_data() | {
            "peak_with_checkpointing_changed": plan_stage(recipe, other, limit, device).peak,
            "seconds_per_step": time_step(recipe, stage)
            if time_step is not None
            else plan.flops_per_step / (UTILISATION * _rate(plan.device, plan.precision)),
            "timed": time_step is not None,
            "auto": why,
            "nearest": [
                {"settings": _words(changes), "peak": its_plan.peak}
                for changes, its_plan in nearest
            ],
        }
    return {"stages": stages, "disk": sum(data["disk"] for data in stages.values())}


def print_plan(planned: dict[str, Any]) -> None:
    """Print what `plan_run` returns: a table with a column for each stage, and what fits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    stages = planned["stages"]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("GB")
    for name in stages:
        table.add_column(name, justify="right")

    def row(label: str, shown: Callable[[dict[str, Any]], str], **style: Any) -> None:
        table.add_row(label, *(shown(data) for data in stages.values()), **style)

    row("device", lambda data: f"{data['device']}, {data['precision']}")
    row("micro-batch", lambda data: f"{data['rows']} x {data['length']:,}")
    row("optimizer", lambda data: data["optim"])
    row("checkpointing", lambda data: "yes" if data["checkpointing"] else "no", end_section=True)
    row("parameters, M", lambda data: f"{data['parameters'] / 1e6:.1f}")
    for kind in (*KINDS, "overhead"):
        label = "optimizer states" if kind == "optimizer" else kind
        row(label, lambda data, kind=kind: f"{data[kind] / 1e9:.2f}")
    row("peak", lambda data: f"{data['peak'] / 1e9:.2f}", style="bold")
    row("peak is in", lambda data: data["phase"])
    other = "peak_with_checkpointing_changed"
    row("peak, checkpointing changed", lambda data: f"{data[other] / 1e9:.2f}")
    row("limit", lambda data: "none" if data["limit"] is None else f"{data['limit'] / 1e9:.2f}")
    row("fits", lambda data: "yes" if data["fits"] else "no", style="bold", end_section=True)
    row("steps", lambda data: f"{data['steps']:,}" if data["steps"] else "by epoch")
    row("tokens a step, at most", lambda data: f"{data['tokens_per_step']:,}")
    row("seconds a step, at most", lambda data: f"{data['seconds_per_step']:.3g}")
    row(
        "tokens a second", lambda data: f"{data['tokens_per_step'] / data['seconds_per_step']:,.0f}"
    )
    row("minutes, at most", _minutes)
    row("disk", lambda data: f"{data['disk'] / 1e9:.2f}")
    console.print(table)
    for name, data in stages.items():
        if data["auto"]:
            console.print(data["auto"])
        if not data["fits"]:
            console.print(
                f"{name} does not fit; what does:"
                if data["nearest"]
                else f"{name} does not fit, and nothing near it does"
            )
        for item in data["nearest"]:
            console.print(f"  {_gb(item['peak'])}  {item['settings']}")
    if all(data["timed"] for data in stages.values()):
        console.print("Seconds are from a few micro-batches that were timed on this device.")
    else:
        console.print(
            f"Seconds are from operations, at {UTILISATION:.0%} of the device's rate in large "
            "products; --time times some."
        )
    console.print(f"The run takes up to {_gb(planned['disk'])} on disk.")
    for note in dict.fromkeys(note for data in stages.values() for note in data["notes"]):
        console.print(f"Note: {note}.", style="dim")


def _minutes(data: dict[str, Any]) -> str:
    if data["steps"] is None:
        return "by epoch"
    return f"{data['steps'] * data['seconds_per_step'] / 60:,.1f}"
