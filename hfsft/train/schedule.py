"""The learning-rate schedule, and how many steps it has in common with that of a longer run."""

import itertools
from typing import Any

import torch
from transformers import get_scheduler

from hfsft.plan.sizes import steps_of
from hfsft.recipe.schema import Stage

STABLE = "warmup_stable_decay"


DECAY_SHARE = 0.2  # of the steps, as in Hägele et al. 2024, where the recipe says nothing


def scheduler_settings(stage: Stage, max_steps: int) -> dict[str, Any]:
    """The `lr_scheduler_kwargs` of a stage, with `num_decay_steps` in steps."""
    given = dict(stage.trainer.get("lr_scheduler_kwargs") or {})
    if stage.trainer.get("lr_scheduler_type") == STABLE:
        given["num_decay_steps"] = max_steps - _stable_until(stage, max_steps)
    return given


def _asked_steps(stage: Stage, max_steps: int) -> tuple[int, int]:
    """The steps of warm-up and of decay that a recipe asks for."""
    kwargs = stage.trainer.get("lr_scheduler_kwargs") or {}
    decay = steps_of(kwargs.get("num_decay_steps", DECAY_SHARE), max_steps)
    stable = stage.trainer.get("lr_scheduler_type") == STABLE
    return steps_of(stage.trainer.get("warmup_steps", 0), max_steps), decay if stable else 0


def warmup_steps(stage: Stage, max_steps: int) -> int:
    """The steps of warm-up: fewer than asked for if warm-up and decay exceed `max_steps`."""
    warmup, decay = _asked_steps(stage, max_steps)
    if not decay or warmup + decay <= max_steps:
        return warmup
    return warmup * max_steps // (warmup + decay)


def _stable_until(stage: Stage, max_steps: int) -> int:
    """The step after which the learning rate decays: after the warm-up of a shorter run."""
    return max(warmup_steps(stage, max_steps), max_steps - _asked_steps(stage, max_steps)[1])


def scaled_notice(stage: Stage, max_steps: int) -> str | None:
    """What to print if a recipe's warm-up and decay are more than `max_steps`, and are scaled."""
    warmup, decay = _asked_steps(stage, max_steps)
    fitted = warmup_steps(stage, max_steps)
    if fitted == warmup:
        return None
    return (
        f"{stage.name}: warmup_steps {warmup} and num_decay_steps {decay} are more than max_steps "
        f"{max_steps}; scaled to {fitted} and {max_steps - fitted}"
    )


def decay_start(stage: Stage, max_steps: int) -> int | None:
    """The step after which the learning rate decays, under warmup_stable_decay."""
    if stage.trainer.get("lr_scheduler_type") != STABLE:
        return None
    return _stable_until(stage, max_steps)


def _learning_rates(stage: Stage, max_steps: int) -> list[float]:
    """The learning-rate factor of each step; empty where it depends on the losses."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        stage.trainer.get("lr_scheduler_type", "linear"),
        optimizer,
        warmup_steps(stage, max_steps),
        max_steps,
        scheduler_settings(stage, max_steps),
    )
    factor = getattr(scheduler, "lr_lambdas", [None])[0]
    return [factor(step) for step in range(max_steps + 1)] if factor else []


def shared_steps(stage: Stage, before: int, now: int) -> int:
    """How many steps two runs share that differ in `max_steps` alone.

    A checkpoint also holds the learning rate of the step after it, which must be the same too.
    """
    rates = zip(_learning_rates(stage, before), _learning_rates(stage, now), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], rates)
    return sum(1 for _ in same) - 1
