"""The trainer's arguments, from a recipe."""

import math
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from trl import SFTConfig

from hfsft.data.stream import TextStream
from hfsft.errors import RecipeError
from hfsft.model.loading import bf16_is_native
from hfsft.model.optimizer import optimizer_settings, require_package
from hfsft.plan.step_memory import uses_checkpointing
from hfsft.recipe.checks import check_tokens_per_step
from hfsft.recipe.schema import MUON, Stage
from hfsft.train.schedule import scaled_notice, scheduler_settings, warmup_steps


def trains_on_cpu(stage: Stage) -> bool:
    """Whether a stage trains on the CPU: as asked for, or because nothing else is here."""
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return wanted or bool(stage.trainer.get("use_cpu")) or not torch.accelerator.is_available()


def precision() -> dict[str, bool]:
    """Mixed precision as Accelerate is configured, else what the hardware is fast at.

    Returns:
        `bf16` and `fp16` for `TrainingArguments`: bfloat16 where it is native, float16 on older
        GPUs; neither on Apple's GPUs (not run by us), nor on a CPU, where bfloat16 matmul was
        measured 70 times slower than float32.
    """
    chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if chosen not in ("bf16", "fp16"):
        chosen = "no"
        if PartialState().device.type == "cuda":
            chosen = "bf16" if bf16_is_native() else "fp16"
    return {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}


def arguments(stage: Stage, train: Any, examples: int) -> TrainingArguments:
    """The trainer's arguments: the recipe's own, and what hfsft derives from them.

    Args:
        stage: its `trainer` settings are passed through untouched.
        train: the training set, for the number of steps where the recipe gives epochs.
        examples: of an optimizer step, over all devices.

    Returns:
        `TrainingArguments`, for sft an `SFTConfig`.

    Raises:
        RecipeError: if upstream refuses the settings.
    """
    settings = dict(stage.trainer)
    settings.pop("torch_compile", None)  # layer by layer: see `compile_layers`
    config_class = TrainingArguments
    if stage.name == "sft":
        config_class = SFTConfig
        # the rows are encoded, truncated and masked already
        settings |= {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": stage.max_length,
        }
    if settings.get("bf16") is None and settings.get("fp16") is None:
        settings |= precision()
    else:
        settings |= {key: bool(settings.get(key)) for key in ("bf16", "fp16")}
    _check_optimizer(stage)
    _check_offload(stage)
    settings |= optimizer_settings(stage)
    on_cpu = PartialState().device.type == "cpu"
    use_cpu = on_cpu
    if PartialState().distributed_type == DistributedType.DEEPSPEED and on_cpu:
        use_cpu, settings["ddp_backend"] = False, "gloo"  # `use_cpu` would turn DeepSpeed off
    if not stage.validates:
        settings["eval_strategy"] = "no"
        settings.pop("eval_steps", None)
    try:
        made = config_class(
            output_dir=str(stage.checkpoints),
            run_name=f"{stage.folder.parent.name}-{stage.name}",
            seed=stage.seed,
            gradient_accumulation_steps=1,  # `training_step` cuts a step into micro-batches
            remove_unused_columns=False,
            disable_tqdm=True,  # ConsoleCallback draws the bar
            include_num_input_tokens_seen="non_padding",
            ignore_data_skip=isinstance(train, TextStream),  # a stream resumes from its own state
            logging_nan_inf_filter=False,  # it would log a NaN as the mean of earlier losses
            **{
                "use_cpu": use_cpu,
                "dataloader_pin_memory": not on_cpu,
                "log_level_replica": "error",  # they would warn where rank 0 does not
            }
            | settings,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
    made.max_steps = _steps(stage, train, examples, made.num_train_epochs)
    made.lr_scheduler_kwargs = scheduler_settings(stage, made.max_steps)
    notice = scaled_notice(stage, made.max_steps)
    if notice:
        made.warmup_steps = warmup_steps(stage, made.max_steps)
        if PartialState().is_main_process and not stage.quiet:
            print(notice)
    return made


def _steps(stage: Stage, train: Any, examples: int, epochs: float) -> int:
    """The optimizer steps of a run: `max_steps`, or those of its epochs."""
    if stage.max_steps is not None:
        return stage.max_steps
    if stage.name == "sft":
        return len(train) // examples  # the examples of the whole run
    if isinstance(train, TextStream):
        raise RecipeError(f"{stage.name}: a stream has no epochs; give max_steps")
    return max(1, math.ceil(len(train) * epochs / examples))


def _check_optimizer(stage: Stage) -> None:
    """Refuse an optimizer that is not installed, or that needs more of a matrix than a shard."""
    optim = str(stage.trainer.get("optim"))
    if PartialState().device.type == "mps" and ("8bit" in optim or "paged" in optim):
        # by bitsandbytes' source: its mps backend registers no optimizer; not run by us
        raise RecipeError(
            f"{stage.name}.optim: {optim} does not run on Apple's GPUs; use --optim adamw_torch"
        )
    require_package(stage)
    if optim != MUON and not optim.startswith("apollo"):
        return
    for plugin in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise RecipeError(
                f"{stage.name}.optim: {optim} needs whole matrices on each device, and {plugin} "
                "shards them; use accelerate_configs/multi_gpu.yaml, or another optimizer"
            )


def _check_offload(stage: Stage) -> None:
    """Refuse to move activations into main memory where they are there already."""
    kwargs = stage.trainer.get("activation_checkpointing_kwargs") or {}
    if kwargs.get("offload") and uses_checkpointing(stage) and PartialState().device.type == "cpu":
        raise RecipeError(
            f"{stage.name}.activation_checkpointing_kwargs.offload: moves activations from a GPU "
            "to main memory; leave it out on a CPU"
        )


def rows_per_step(stage: Stage, length: int) -> int:
    """Packed rows of a base or mid step, over all devices.

    Args:
        stage: `tokens_per_step`, or without it one batch on each device.
        length: tokens per row.

    Raises:
        RecipeError: if the step does not divide over the devices.
    """
    processes = PartialState().num_processes
    if stage.tokens_per_step is None:
        return stage.trainer["per_device_train_batch_size"] * processes
    return check_tokens_per_step(stage.name, stage.tokens_per_step, length, processes, "recipe")
