"""Settings that fit: what `auto` becomes, and what to change where a stage does not fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hfsft.errors import MemoryShortage
from hfsft.plan.plan import (
    UTILISATION,
    Plan,
    examples_per_rank,
    gigabytes,
    has_gpu,
    limit_of,
    matmul_rate,
    plan_stage,
    row_length,
)
from hfsft.plan.step_memory import KINDS
from hfsft.recipe.key import AUTO
from hfsft.recipe.names import RENAMED
from hfsft.recipe.schema import STAGE_FIELDS, Recipe, Stage

BUSY_TOKENS = 4096  # assumed: a smaller micro-batch is bound by kernel launches, not arithmetic
MARGIN = 0.95  # the share of the limit that `auto` plans for: a plan is off by a few percent
# from most to least GPU memory per parameter
OPTIMIZERS = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
LORA = {"r": 16}  # what is proposed


def with_settings(stage: Stage, **changes: Any) -> Stage:
    """A copy of a stage with other settings, by the keys of a recipe."""
    own = {key: value for key, value in changes.items() if key in STAGE_FIELDS}
    upstream = {RENAMED.get(key, key): changes[key] for key in changes.keys() - own.keys()}
    return replace(stage, trainer=stage.trainer | upstream, **own)


def nearest_settings(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> list[tuple[dict[str, Any], Plan]]:
    """The nearest settings that fit, for a stage that does not.

    Args:
        recipe: all arguments are those of `plan_stage`.

    Returns:
        Changed settings by the recipe's keys, each with its plan: every change that suffices alone,
        else the smallest combination that does, else nothing.
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
    """Whether a smaller micro-batch leaves the step unchanged."""
    return stage.name == "sft" or stage.tokens_per_step is not None


def _largest(values: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending values that fits, by bisection; None if none does."""
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
    """Choose a stage's `auto` values: the largest micro-batch and the fastest settings that fit.

    Memory is saved first where it costs no time: 8-bit optimizer states, then activation
    checkpointing, and only then micro-batches below `BUSY_TOKENS`. The step's examples, and so its
    result, do not change.

    Args:
        recipe: all arguments are those of `plan_stage`.

    Returns:
        The stage with the values, and a sentence of what was chosen and why; "" if nothing was
        `auto`.
    """
    keys = ("per_device_train_batch_size", "activation_checkpointing", "optim")
    if AUTO not in [stage.trainer.get(key) for key in keys]:
        return stage, ""
    given_rows, given_checkpointing, given_optim = (stage.trainer.get(key) for key in keys)
    device = device_type or ("cuda" if has_gpu(stage) else "cpu")
    limit = limit_of(stage, device) if limit_bytes is None else limit_bytes
    optims = OPTIMIZERS if device == "cuda" else OPTIMIZERS[:2]
    settings = [
        {"activation_checkpointing": checkpointing, "optim": optim}
        for checkpointing in ((False, True) if given_checkpointing == AUTO else (None,))
        for optim in (optims if given_optim == AUTO else (None,))
    ]
    settings = [{k: v for k, v in item.items() if v is not None} for item in settings]
    # paged states may stall on PCIe transfers, so try them last
    settings.sort(key=lambda item: item.get("optim") == OPTIMIZERS[2])
    rows = [given_rows]
    if given_rows == AUTO:
        rows = list(range(1, examples_per_rank(recipe, stage) + 1))

    def plan(item: dict[str, Any], count: int) -> Plan:
        changed = with_settings(stage, per_device_train_batch_size=count, **item)
        return plan_stage(recipe, changed, limit and int(limit * MARGIN), device)

    enough = min(rows[-1], -(-BUSY_TOKENS // row_length(recipe, stage)))
    enough = rows[0] if given_rows != AUTO else enough
    chosen = next((item for item in settings if plan(item, enough).fits), settings[-1])
    best = _largest(rows, lambda count: plan(chosen, count).fits) or rows[0]
    its_plan = plan(chosen, best)
    values = {"per_device_train_batch_size": best} if given_rows == AUTO else {}
    values |= chosen
    why = f"{stage.name}: auto chose {as_flags(values)}, planned at {gigabytes(its_plan.peak)}"
    if limit is not None:
        why += f" of {gigabytes(limit)}"
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
    """The end of a sentence: the faster or larger choice that would not fit."""
    before = settings.index(chosen) - 1
    if before >= 0:
        peak = plan(settings[before], enough).peak
        return f"; {as_flags(settings[before])} would take {gigabytes(peak)}"
    if best < rows[-1]:
        return f"; {best + 1} rows would take {gigabytes(plan(chosen, best + 1).peak)}"
    return "; it is the whole step at once" if len(rows) > 1 else ""


def as_flags(changes: dict[str, Any]) -> str:
    """Settings as command-line flags."""
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
    fitting = [f"{as_flags(changes)} ({gigabytes(its_plan.peak)})" for changes, its_plan in nearest]
    raise MemoryShortage(
        f"{stage.name}: needs {gigabytes(plan.peak)} at its peak ({plan.phase}), "
        f"{gigabytes(-plan.headroom)} more than there is\n"
        f"  GB: {sizes}\n"
        f"  What fits: {'; '.join(fitting) or 'nothing near; take a smaller model'}\n"
        "  --ignore_plan starts it anyway"
    )


# --- a run's plan ---


def _rate(plan: Plan) -> float:
    """FLOP/s that a step is assumed to reach on one device."""
    return UTILISATION * matmul_rate(plan.device, plan.precision)


def plan_run(
    recipe: Recipe,
    memory: int | None = None,
    time_step: Callable[[Recipe, Stage], float] | None = None,
) -> dict[str, Any]:
    """Plan every stage of a run.

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
            "seconds_per_step": plan.seconds_sent
            + (
                time_step(recipe, stage)
                if time_step is not None
                else plan.flops_per_step / plan.processes / _rate(plan)
            ),
            "timed": time_step is not None,
            "auto": why,
            "nearest": [
                {"settings": as_flags(changes), "peak": its_plan.peak}
                for changes, its_plan in nearest
            ],
        }
    return {"stages": stages, "disk": sum(data["disk"] for data in stages.values())}
