"""Seconds a step takes, from a few of its micro-batches on this device."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hfsft.data.packing import StepCollator, model_inputs
from hfsft.errors import RecipeError
from hfsft.model.attention import packed_attention
from hfsft.model.head import fuse_head
from hfsft.model.loading import with_lora
from hfsft.plan.plan import examples_of_step, planned_step
from hfsft.plan.step_memory import make_optimizer, uses_checkpointing
from hfsft.recipe.schema import Recipe, Stage

MICRO_BATCHES = 3  # that are timed, after one that is not


def seconds_per_step(recipe: Recipe, stage: Stage) -> float:
    """Time a stage's step on random tokens, its rows full and every token trained.

    Args:
        recipe: whose stage.
        stage: without `auto` values; its model is made from the configuration, not loaded.

    Returns:
        Seconds of a whole step at the most tokens it can have: its micro-batches and the update.

    Raises:
        RecipeError: for 4-bit weights, which are not made from a configuration.
    """
    if stage.load_in_4bit:
        raise RecipeError(f"{stage.name}.load_in_4bit: 4-bit weights cannot be timed before a run")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    step = planned_step(recipe, stage, cuda)
    model = AutoModelForCausalLM.from_config(step.config).to(device).train()
    if uses_checkpointing(stage):
        model.activation_checkpointing_enable()
    fused = fuse_head(model)
    half = getattr(torch, step.half) if step.half else None
    model.set_attn_implementation(packed_attention(model, device, half is not None, step.length))
    if stage.lora is not None:
        model = with_lora(model, stage)
    optimizer = make_optimizer(step, model)
    vocabulary = step.config.get_text_config().vocab_size
    rows = torch.randint(0, vocabulary, (step.rows, step.length)).tolist()
    batch = StepCollator(0, step.length)([{"input_ids": ids} for ids in rows])
    inputs = model_inputs(batch) if fused else batch
    inputs = {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }

    def micro_batch() -> None:
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = model(**inputs)[0] if fused else model(**inputs, use_cache=False).loss
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    micro_batch()
    update()  # makes the optimizer's states
    count = -(-examples_of_step(recipe, stage) // step.rows)
    return count * _seconds(micro_batch, MICRO_BATCHES, cuda) + _seconds(update, 1, cuda)


def _seconds(act: Any, times: int, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        act()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times
