"""Seconds a step takes, from a few of its micro-batches on this device."""

import gc
import time
from collections.abc import Callable

import torch

from hfsft.data.packing import StepCollator, model_inputs, on_device
from hfsft.errors import MemoryShortage, RecipeError, first_line
from hfsft.model.activation import square_in_half
from hfsft.model.attention import packed_attention
from hfsft.model.compiling import compile_layers, compiled_for
from hfsft.model.loading import plain_model, with_lora
from hfsft.model.optimizer import require_package
from hfsft.plan.plan import examples_per_rank, has_gpu, planned_step
from hfsft.plan.step_memory import make_optimizer, model_of
from hfsft.recipe.schema import Recipe, Stage

MICRO_BATCHES = 3  # that are timed, after one that is not


def seconds_per_step(recipe: Recipe, stage: Stage) -> float:
    """Time a stage's step on random tokens, its rows full and every token trained.

    Args:
        recipe: whose stage.
        stage: without `auto` values; its model is built from the configuration, not loaded.

    Returns:
        Seconds of a step at the most tokens it can have: its micro-batches and the update.

    Raises:
        RecipeError: for 4-bit weights, which cannot be built from a configuration, for an optimizer
            that is not installed or cannot be built from its settings alone, and if nothing can be
            compiled.
        MemoryShortage: if memory runs out.
    """
    if stage.load_in_4bit:
        raise RecipeError(f"{stage.name}.load_in_4bit: 4-bit weights cannot be timed before a run")
    require_package(stage)
    try:
        return _time_step(recipe, stage)
    except torch.OutOfMemoryError as error:
        raise MemoryShortage(
            f"{stage.name}: out of memory while its step is timed: {first_line(error)}\n"
            "  Another program may hold memory of this device; leave --time out"
        ) from None
    finally:
        gc.collect()  # a model with a fused head is a reference cycle
        torch.cuda.empty_cache()


def _time_step(recipe: Recipe, stage: Stage) -> float:
    device = torch.device("cuda" if has_gpu(stage) else "cpu")
    step = planned_step(recipe, stage, device.type == "cuda")
    with device:
        model, fused = model_of(step, step.layers, step.attention)
    half = getattr(torch, step.half) if step.half else None
    square_in_half(model)
    compiled = bool(stage.trainer.get("torch_compile"))
    if fused:  # the others get no document lengths
        attention = packed_attention(model, device, half is not None, step.length, compiled)
        model.set_attn_implementation(attention)
    if stage.lora is not None:
        model = with_lora(model, stage)
    if compiled:
        compile_layers(plain_model(model))
    optimizer = make_optimizer(step, model)
    if optimizer is None:
        raise RecipeError(
            f"{stage.name}.optim: {stage.trainer.get('optim')} cannot be built before a run, so it "
            "cannot be timed; leave --time out"
        )
    vocabulary = step.config.get_text_config().vocab_size
    rows = torch.randint(0, vocabulary, (step.rows, step.length)).tolist()
    batch = StepCollator(0, step.length)([{"input_ids": ids} for ids in rows])
    inputs = on_device(model_inputs(batch) if fused else batch, device)

    def micro_batch() -> None:
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = model(**inputs)[0] if fused else model(**inputs, use_cache=False).loss
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.train()
    with compiled_for(stage):
        micro_batch()
        update()  # allocates the optimizer's states
    count = -(-examples_per_rank(recipe, stage) // step.rows)
    return count * _seconds(micro_batch, MICRO_BATCHES) + _seconds(update, 1)


def _seconds(act: Callable[[], None], times: int) -> float:
    """Mean seconds of some calls, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times
