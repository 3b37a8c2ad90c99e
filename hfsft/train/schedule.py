"""The learning-rate schedule, and how many steps two runs of different length share."""

import itertools
import math
from typing import Any

import torch
from transformers import get_scheduler

from hfsft.errors import RecipeError
from hfsft.recipe.schema import Stage

STABLE = "warmup_stable_decay"


DECAY_SHARE = 0.2  # of the steps, as in Hägele et al. 2024, where the recipe says nothing


def scheduler_settings(stage: Stage, max_steps: int) -> dict[str, Any]:
    """The `lr_scheduler_kwargs` of a stage; a share of decaying steps becomes their number.

    Raises:
        RecipeError: if warmup and decay are longer than the stage.
    """
    given = dict(stage.trainer.get("lr_scheduler_kwargs") or {})
    if stage.trainer.get("lr_scheduler_type") != STABLE:
        return given
    decay = given.get("num_decay_steps", DECAY_SHARE)
    given["num_decay_steps"] = math.ceil(decay * max_steps) if decay < 1 else int(decay)
    if _warmup_steps(stage, max_steps) + given["num_decay_steps"] > max_steps:
        raise RecipeError(
            f"{stage.name}: warmup_steps and num_decay_steps are more than max_steps, {max_steps}"
        )
    return given


def _warmup_steps(stage: Stage, max_steps: int) -> int:
    warmup = stage.trainer.get("warmup_steps", 0)  # as in TrainingArguments.get_warmup_steps
    return math.ceil(warmup * max_steps) if warmup < 1 else int(warmup)


def decay_start(stage: Stage, max_steps: int) -> int | None:
    """The step after which the learning rate decays, under warmup_stable_decay."""
    if stage.trainer.get("lr_scheduler_type") != STABLE:
        return None
    return max_steps - scheduler_settings(stage, max_steps)["num_decay_steps"]


def _learning_rates(stage: Stage, max_steps: int) -> list[float]:
    """The factor of the learning rate at each step; none where it depends on the run."""
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
    """How many steps two runs have in common that differ in `max_steps` alone.

    A checkpoint of that step has the learning rate of the next one in it, which is the same too.
    """
    rates = zip(_learning_rates(stage, before), _learning_rates(stage, now), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], rates)
    return sum(1 for _ in same) - 1
