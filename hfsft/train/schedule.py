"""The learning-rate schedule, and how many steps it has in common with that of a longer run."""

import itertools
from typing import Any

import torch
from transformers import get_scheduler

from hfsft.errors import RecipeError
from hfsft.plan.sizes import steps_of
from hfsft.recipe.schema import Stage

STABLE = "warmup_stable_decay"


DECAY_SHARE = 0.2  # of the steps, as in Hägele et al. 2024, where the recipe says nothing


def scheduler_settings(stage: Stage, max_steps: int) -> dict[str, Any]:
    """The `lr_scheduler_kwargs` of a stage, with `num_decay_steps` in steps.

    Raises:
        RecipeError: if warm-up and decay are longer than the stage.
    """
    given = dict(stage.trainer.get("lr_scheduler_kwargs") or {})
    if stage.trainer.get("lr_scheduler_type") != STABLE:
        return given
    decay = given.get("num_decay_steps", DECAY_SHARE)
    given["num_decay_steps"] = steps_of(decay, max_steps)
    if _warmup_steps(stage, max_steps) + given["num_decay_steps"] > max_steps:
        raise RecipeError(
            f"{stage.name}: warmup_steps and num_decay_steps are more than max_steps, {max_steps}"
        )
    return given


def _warmup_steps(stage: Stage, max_steps: int) -> int:
    return steps_of(stage.trainer.get("warmup_steps", 0), max_steps)


def decay_start(stage: Stage, max_steps: int) -> int | None:
    """The step after which the learning rate decays, under warmup_stable_decay."""
    if stage.trainer.get("lr_scheduler_type") != STABLE:
        return None
    return max_steps - scheduler_settings(stage, max_steps)["num_decay_steps"]


def _learning_rates(stage: Stage, max_steps: int) -> list[float]:
    """The learning-rate factor of each step; empty where it depends on the losses."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        stage.trainer.get("lr_scheduler_type", "linear"),
        optimizer,
        _warmup_steps(stage, max_steps),
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
