"""Settings that fit: what `auto` becomes, and what to change where a stage does not fit."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hfsft.errors import MemoryShortage, RecipeError
from hfsft.model.optimizer import FOR_BFLOAT16, INSTALL, missing_package
from hfsft.plan.horizon import with_horizon
from hfsft.plan.plan import (
    SFT_FILL,
    Plan,
    estimated_seconds,
    examples_per_rank,
    gigabytes,
    has_gpu,
    limit_of,
    plan_stage,
)
from hfsft.plan.step_memory import KINDS
from hfsft.recipe.key import AUTO
from hfsft.recipe.names import RENAMED
from hfsft.recipe.schema import STAGE_FIELDS, Recipe, Stage

MARGIN = 0.95  # the share of the limit that `auto` plans for: a plan is off by a few percent
# from most to least GPU memory per parameter; for weights in bfloat16 there are others
OPTIMIZERS = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
WORTH = 0.95  # of the time: settings that save memory must be faster by this to be chosen
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
    smaller, low_bit = _smaller_optimizers(stage, now)
    checkpointing = [] if now.checkpointing else [{"gradient_checkpointing": True}]
    adapter = [{"lora": LORA}] if stage.name != "base" and stage.lora is None else []
    rows = list(range(1, now.rows)) if _may_cut_rows(stage) else []
    alone = [*largest("per_device_train_batch_size", rows), *checkpointing, *smaller, *low_bit]
    alone += [*adapter, *largest("max_length", lengths)]
    found = [(changes, plan(changes)) for changes in alone]
    found = [(changes, its_plan) for changes, its_plan in found if its_plan.fits]
    if found:
        return found
    together: dict[str, Any] = {}
    for changes in [{"per_device_train_batch_size": 1}] * bool(rows) + checkpointing + smaller:
        together |= changes
        if (its_plan := plan(together)).fits:
            return [(together, its_plan)]
    for changes in low_bit + adapter:
        if (its_plan := plan(together | changes)).fits:
            return [(together | changes, its_plan)]
    for changes in adapter:
        together |= changes
    best = _largest(lengths, lambda length: plan(together | {"max_length": length}).fits)
    if best is None:
        return []
    together["max_length"] = best
    return [(together, plan(together))]


def _smaller_optimizers(stage: Stage, plan: Plan) -> tuple[list[dict[str, Any]], ...]:
    """Settings with an optimizer that takes less memory: with these weights, and in bfloat16."""
    same = optimizers(stage, plan.device)
    after = same.index(plan.optim) + 1 if plan.optim in same else 1
    low_bit = []
    if stage.name != "base" and stage.lora is None and not in_bfloat16(stage):
        low_bit = [{"dtype": "bfloat16", "optim": optim} for optim in FOR_BFLOAT16]
    return [{"optim": optim} for optim in same[after:]], low_bit


def in_bfloat16(stage: Stage) -> bool:
    """Whether a stage keeps its weights in bfloat16, without a master copy in float32."""
    return stage.dtype == "bfloat16" and stage.lora is None


def optimizers(stage: Stage, device: str) -> tuple[str, ...]:
    """The optimizers that fit a stage's weights, from most to least memory per parameter."""
    if in_bfloat16(stage):
        return FOR_BFLOAT16
    return OPTIMIZERS if device == "cuda" else OPTIMIZERS[:2]


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
    """Choose a stage's `auto` values: those with the least estimated time of all that fit.

    For each optimizer, with and without activation checkpointing, the largest micro-batch that fits
    is planned. A small model on a fast card is bound by kernel launches, and recomputing layers
    pays there if it allows fewer micro-batches. The step's examples, and so its result, stay.

    Args:
        recipe: all arguments are those of `plan_stage`.

    Returns:
        The stage with the values, and a sentence of what was chosen and why; "" if nothing was
        `auto`.

    Raises:
        RecipeError: if no optimizer for weights in bfloat16 is installed.
    """
    keys = ("per_device_train_batch_size", "activation_checkpointing", "optim")
    if AUTO not in [stage.trainer.get(key) for key in keys]:
        return stage, ""
    given_rows = stage.trainer.get("per_device_train_batch_size")
    device = device_type or ("cuda" if has_gpu(stage) else "cpu")
    limit = limit_of(stage, device) if limit_bytes is None else limit_bytes
    settings = _candidates(stage, device)
    rows = [given_rows]
    if given_rows == AUTO:
        rows = list(range(1, examples_per_rank(recipe, stage) + 1))

    def plan(item: dict[str, Any], count: int) -> Plan:
        changed = with_settings(stage, per_device_train_batch_size=count, **item)
        return plan_stage(recipe, changed, limit and int(limit * MARGIN), device)

    fitting = [_largest(rows, lambda n, item=item: plan(item, n).fits) for item in settings]
    chosen, best = settings[-1], rows[0]  # where nothing fits, and the plan refuses it
    fastest = math.inf
    for item, count in zip(settings, fitting, strict=True):
        if count is None:
            continue
        fill = SFT_FILL if stage.name == "sft" else 1.0
        seconds = estimated_seconds(plan(item, count), stage, fill)
        if seconds < WORTH * fastest:
            chosen, best, fastest = item, count, seconds
    values = {"per_device_train_batch_size": best} if given_rows == AUTO else {}
    values |= chosen
    peak = plan(chosen, best).peak
    why = f"{stage.name}: auto chose {as_flags(values)}, planned at {gigabytes(peak)}"
    if limit is not None:
        why += f" of {gigabytes(limit)}"
    if chosen != settings[0]:
        why += f"; {as_flags(settings[0])} would take {gigabytes(plan(settings[0], best).peak)}"
    elif best < rows[-1]:
        why += f"; {best + 1} rows would take {gigabytes(plan(chosen, best + 1).peak)}"
    elif len(rows) > 1:
        why += "; it is the whole step at once"
    return with_settings(stage, per_device_train_batch_size=best, **chosen), why


def _candidates(stage: Stage, device: str) -> list[dict[str, Any]]:
    """Values for the `auto` keys but the rows, those that take most memory first."""
    given_checkpointing = stage.trainer.get("activation_checkpointing")
    given_optim = stage.trainer.get("optim")
    optims = optimizers(stage, device)
    if given_optim == AUTO and in_bfloat16(stage):
        optims = tuple(optim for optim in optims if missing_package(optim) is None)
        if not optims:
            raise RecipeError(
                f"{stage.name}.optim: auto with dtype: bfloat16 needs torchao: {INSTALL['torchao']}"
            )
    settings = [
        {"activation_checkpointing": checkpointing, "optim": optim}
        for checkpointing in ((False, True) if given_checkpointing == AUTO else (None,))
        for optim in (optims if given_optim == AUTO else (None,))
    ]
    settings = [{k: v for k, v in item.items() if v is not None} for item in settings]
    # paged states may stall on PCIe transfers, so try them last
    settings.sort(key=lambda item: item.get("optim") == OPTIMIZERS[2])
    return settings


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


def plan_run(
    recipe: Recipe,
    memory: int | None = None,
    time_step: Callable[[Recipe, Stage], float] | None = None,
) -> dict[str, Any]:
    """Plan every stage of a run.

    Args:
        recipe: whose stages, `auto` values included.
        memory: bytes of a CUDA card to plan for; None: this machine's device.
        time_step: measures the seconds of a step; None, or where the plan does not fit: they come
            from its operations.

    Returns:
        `stages`: name → `Plan.as_data`, `auto` (what was chosen) and `nearest` (where it does not
        fit), `seconds_per_step`, at most, whether it was `timed`, and where it was and is compiled
        `seconds_per_step_uncompiled`; `disk`: bytes of all.

    Raises:
        RecipeError, ModelError: as the stages themselves would.
    """
    stages = {}
    for name, given in recipe.stages.items():
        stage = with_horizon(recipe, given)
        device, limit = None if memory is None else "cuda", memory
        if memory is not None and stage.memory_limit is not None:
            limit = min(memory, stage.memory_limit_bytes)
        stage, why = choose(recipe, stage, limit, device)
        plan = plan_stage(recipe, stage, limit, device)
        nearest = [] if plan.fits else nearest_settings(recipe, stage, limit, device)
        other = with_settings(stage, gradient_checkpointing=not plan.checkpointing)
        stages[name] = plan.as_data() | {
            "peak_with_checkpointing_changed": plan_stage(recipe, other, limit, device).peak,
            **_times(recipe, stage, plan, time_step if plan.fits else None),
            "auto": why,
            "nearest": [
                {"settings": as_flags(changes), "peak": its_plan.peak}
                for changes, its_plan in nearest
            ],
        }
    return {"stages": stages, "disk": sum(data["disk"] for data in stages.values())}


def _times(
    recipe: Recipe, stage: Stage, plan: Plan, time_step: Callable[[Recipe, Stage], float] | None
) -> dict[str, Any]:
    """The seconds of a stage's step in `plan_run`."""
    if time_step is None:
        now, uncompiled = estimated_seconds(plan, stage), None
    else:
        without = with_settings(stage, torch_compile=False)
        compiled = stage.trainer.get("torch_compile")
        uncompiled = plan.seconds_sent + time_step(recipe, without) if compiled else None
        now = time_step(recipe, stage)
    return {
        "seconds_per_step": plan.seconds_sent + now,
        "timed": time_step is not None,
        "seconds_per_step_uncompiled": uncompiled,
    }
