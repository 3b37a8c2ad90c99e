"""What the three stages share: their arguments, beginning and end, and the files they leave."""

import gc
import json
import math
import os
import resource
import signal
import sys
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from transformers import TrainingArguments
from trl import SFTConfig

from hfsft.card import model_card
from hfsft.checkpoint import checkpoints, newest_whole, step_of
from hfsft.corpus import TextStream
from hfsft.errors import Interrupted, RecipeError
from hfsft.keys import AUTO
from hfsft.model import bf16_is_native, merged_model
from hfsft.push import check_push, report_pushes
from hfsft.recipe import Recipe, Stage, check_tokens_per_step
from hfsft.record import (
    changed_keys,
    finished_line,
    is_finished,
    other_settings,
    read_record,
    settings_of,
    write_record,
)
from hfsft.trainer import StepAbandoned

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes")


# --- arguments ---


def precision() -> dict[str, bool]:
    """Mixed precision as Accelerate was configured, else as the hardware does it well.

    Returns:
        `bf16` and `fp16` for `TrainingArguments`: bfloat16 where it is native, float16 on older
        GPUs, neither on a CPU (its bfloat16 products ran 70 times slower than float32 where
        measured).
    """
    chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if chosen not in ("bf16", "fp16"):
        chosen = "no"
        if PartialState().device.type == "cuda":
            chosen = "bf16" if bf16_is_native() else "fp16"
    return {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}


def arguments(stage: Stage, train: Any, examples: int) -> TrainingArguments:
    """The trainer's arguments: the recipe's, with what hfsft derives from them.

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
    config_class = TrainingArguments
    if stage.name == "sft":
        config_class = SFTConfig
        # the rows come encoded, cut and masked
        settings |= {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": stage.max_length,
        }
    if settings.get("bf16") is None and settings.get("fp16") is None:
        settings |= precision()
    else:
        settings |= {key: bool(settings.get(key)) for key in ("bf16", "fp16")}
    on_cpu = PartialState().device.type == "cpu"
    if not stage.validates:
        settings["eval_strategy"] = "no"
        settings.pop("eval_steps", None)
    try:
        made = config_class(
            output_dir=str(stage.checkpoints),
            seed=stage.seed,
            gradient_accumulation_steps=1,  # a step comes whole and is cut up in `training_step`
            remove_unused_columns=False,
            disable_tqdm=True,  # ConsoleCallback draws the bar
            include_num_input_tokens_seen="non_padding",
            ignore_data_skip=isinstance(train, TextStream),  # it goes on from its own state
            logging_nan_inf_filter=False,  # it logs a NaN as the mean of the losses before
            **{"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu} | settings,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
    if stage.max_steps is not None:
        made.max_steps = stage.max_steps
    elif stage.name == "sft":
        made.max_steps = len(train) // examples  # it holds the examples of the whole run
    elif isinstance(train, TextStream):
        raise RecipeError(f"{stage.name}: a stream has no epochs; give max_steps")
    else:
        made.max_steps = max(1, math.ceil(len(train) * made.num_train_epochs / examples))
    return made


def rows_per_step(stage: Stage, length: int) -> int:
    """Packed rows of a base or mid step, over all devices.

    Args:
        stage: `tokens_per_step`, or without it one batch on each device.
        length: tokens a row.

    Raises:
        RecipeError: if the step does not divide over the devices.
    """
    processes = PartialState().num_processes
    if stage.tokens_per_step is None:
        return stage.trainer["per_device_train_batch_size"] * processes
    return check_tokens_per_step(stage.name, stage.tokens_per_step, length, processes, "recipe")


# --- a stage's beginning and end ---


def open_stage(recipe: Recipe, stage: Stage) -> Stage | None:
    """Begin a stage: set the libraries' voices, seed, look at what the folder holds, and plan.

    Returns:
        The stage with a value for every `auto`; None if it is finished already, with the same
        settings: there is nothing to do.

    Raises:
        RecipeError: if the folder holds a stage of other settings; nothing is touched.
        MemoryShortage: if the plan does not fit.
    """
    gc.freeze()  # what was imported stays
    gc.enable()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    # peft 0.21 asks transformers by the old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    if stage.quiet or not sys.stdout.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    # without an accelerator several processes train on the CPU, if Accelerate is told so
    state = PartialState(cpu=_on_cpu(stage))
    if state.device.type == "cpu":
        # `accelerate launch` sets OMP_NUM_THREADS to 1 where it was not told how many
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // state.num_processes))
    elif stage.memory_limit is not None and state.device.type == "cuda":
        total = torch.cuda.get_device_properties(state.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, stage.memory_limit_bytes / total))
    transformers.set_seed(stage.seed)
    finished = not recipe.restart and is_finished(recipe, stage)
    if stage.push_to_hub and state.is_main_process and not finished:
        check_push(stage)
    if recipe.restart:
        if stage.checkpoints.exists():
            lock_stage(stage)
        with state.main_process_first():
            if state.is_main_process:
                _move_aside(stage.folder)
    if finished:
        if state.is_main_process and not stage.quiet:
            print(finished_line(stage))
        return None
    record, found = read_record(stage.folder), checkpoints(stage.checkpoints)
    if record is not None and found:
        changed = changed_keys(record["settings"], settings_of(recipe, stage))
        if changed:
            raise other_settings(stage, f"stopped at {found[0].name}", changed)
    return _planned(recipe, stage, record["chosen"] if record is not None and found else None)


def _planned(recipe: Recipe, stage: Stage, chosen: dict[str, Any] | None) -> Stage:
    """Settle what is `auto`, and refuse what does not fit a GPU or `memory_limit`.

    A run that goes on keeps what was chosen: another optimizer's states would not load.
    """
    automatic = [key for key, value in stage.trainer.items() if value == AUTO]
    on_gpu = PartialState().device.type == "cuda"
    if not (automatic or on_gpu or stage.memory_limit):
        return stage  # without a GPU there is nothing to refuse, and a plan takes seconds
    from hfsft.memory import choose, require_fit, with_settings

    if chosen:
        stage = with_settings(stage, **chosen)
    else:
        stage, why = choose(recipe, stage)
        if why and PartialState().is_main_process and not stage.quiet:
            print(why)
    chosen = {key: stage.trainer[key] for key in automatic}
    return replace(stage, plan=require_fit(recipe, stage).as_data(), chosen=chosen)


def _on_cpu(stage: Stage) -> bool:
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return wanted or bool(stage.trainer.get("use_cpu")) or not torch.accelerator.is_available()


def _move_aside(folder: Path) -> None:
    if folder.exists():
        count = 1
        while (aside := folder.with_name(f"{folder.name}.old-{count}")).exists():
            count += 1
        folder.rename(aside)
        print(f"the old {folder} is now {aside}")


def train_and_save(trainer: Any, recipe: Recipe, stage: Stage) -> None:
    """Train, validate, and leave a whole model folder in the Hub format with its record and card.

    Raises:
        Interrupted: after a signal, once a checkpoint is on disk.
        CheckpointError: if there are checkpoints and none is whole, or none can be written.
    """
    is_main = trainer.is_world_process_zero()
    lock = lock_stage(stage)
    record = _new_record(trainer, recipe, stage)
    if is_main:
        _write_recipe(recipe)
        write_record(stage.folder, record)
    try:
        try:
            _train(trainer, stage)
        except StepAbandoned:
            _save_now(trainer, stage)
        if trainer.stop_signal.received and not trainer.is_complete():
            record["status"] = "interrupted"
            raise _interrupted(trainer, stage)
        record["status"] = "finished"
    except BaseException:
        if record["status"] == "running":
            record["status"] = "failed"
        raise
    finally:
        trainer.stop_signal.give_back()
        record |= _measured(trainer)
        if is_main and record["status"] != "finished":
            write_record(stage.folder, record)
            lock.release()
    _save_model(trainer, stage)
    if is_main:
        _finish_folder(stage, record)
        write_record(stage.folder, record)
        lock.release()
        if not stage.quiet:
            print(_summary(stage, record, trainer.state.global_step))
        if trainer.pusher is not None:
            trainer.say(f"{stage.name}: pushing to {trainer.pusher.target.repo_id}")
            trainer.pusher.model(stage.folder)
            report_pushes(trainer.pusher.finish(), stage.folder, trainer.say)


def lock_stage(stage: Stage) -> Any:
    """Keep a second run out of a stage's folder; the lock goes with this process, however it ends.

    Returns:
        The lock, held by the main process alone.

    Raises:
        RecipeError: if another process holds it.
    """
    held = []
    lock = FileLock(stage.checkpoints / ".lock")
    if PartialState().is_main_process:
        stage.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held.append(str(stage.folder))
    if gather_object(held):
        raise RecipeError(
            f"{stage.folder}: another run is training it; wait for it, or give this one a --name"
        )
    return lock


def _train(trainer: Any, stage: Stage) -> None:
    """Train from the newest whole checkpoint on, and validate where that is still due."""
    checkpoint, passed_over = newest_whole(stage.checkpoints)
    for problem in passed_over:
        trainer.say(f"passed over: {problem}")
    trainer.args.eval_on_start = stage.validates
    if checkpoint is not None:
        trainer.take_up(checkpoint)
        trainer.say(f"{stage.name}: going on from {checkpoint}")
        trainer.args.eval_on_start = trainer.validation_is_due(step_of(checkpoint))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    stopped = trainer.state.global_step < trainer.args.max_steps
    if not stopped and not trainer.is_complete():
        trainer.evaluate()


def _save_now(trainer: Any, stage: Stage) -> None:
    """Save what was reached when a step or a validation was given up."""
    step = trainer.state.global_step
    if step and step not in map(step_of, checkpoints(stage.checkpoints)):
        trainer.save_checkpoint()


def _interrupted(trainer: Any, stage: Stage) -> Interrupted:
    number, step = trainer.stop_signal.received, trainer.state.global_step
    reached = f"{stage.name} stopped by {signal.Signals(number).name} at step {step}"
    if step == 0:
        return Interrupted(f"{reached}, before there was anything to save", number)
    return Interrupted(
        f"{reached} of {trainer.args.max_steps}, saved in {checkpoints(stage.checkpoints)[0]}\n"
        "  The same command goes on from there",
        number,
    )


def _new_record(trainer: Any, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    start = read_record(Path(stage.model_name_or_path)) if stage.model_name_or_path else None
    return {
        "stage": stage.name,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_steps": trainer.args.max_steps,
        "examples_per_step": trainer.get_total_train_batch_size(trainer.args),
        "device": _device_name(trainer.args.device),
        "processes": trainer.args.world_size,
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": {name: version(name) for name in ("hfsft", *LIBRARIES)},
        "recipe": recipe.path,
        "settings": settings_of(recipe, stage),
        "chosen": stage.chosen,
        "plan": stage.plan,
        "lineage": {
            "model": stage.model_name_or_path,
            "revision": stage.revision,
            "stage": start and {key: start[key] for key in ("stage", "steps", "lineage")},
        },
    }


def _measured(trainer: Any) -> dict[str, Any]:
    """What the run took and reached, as far as it came."""
    log, state = trainer.metrics_log, trainer.state
    losses, validation = log.values("loss"), log.values("eval_loss")
    if trainer.args.device.type == "cuda":
        memory = torch.cuda.max_memory_reserved()
    else:  # kilobytes on Linux, bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "steps": state.global_step,
        "micro_batch_rows": trainer.rows,
        "examples": state.global_step * trainer.get_total_train_batch_size(trainer.args),
        "tokens": state.num_input_tokens_seen,
        "seconds": round(log.seconds(), 1) if log.began else 0.0,
        "train_loss": losses[-1] if losses else None,
        "eval_loss": validation[-1] if validation else None,
        "eval_loss_before": validation[0] if validation else None,
        "peak_memory_bytes": memory,
        "peak_memory_of": "GPU reserved" if trainer.args.device.type == "cuda" else "process",
        # what the plan without its overhead is held against
        "peak_allocated_bytes": torch.cuda.max_memory_allocated()
        if trainer.args.device.type == "cuda"
        else None,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _save_model(trainer: Any, stage: Stage) -> None:
    """Save the plain model; a LoRA run's adapter goes beside it."""
    trainer.model.config.use_cache = True  # the trainer turned it off, a chat needs it
    if stage.lora is None:
        trainer.save_model(str(stage.folder))
        if trainer.is_world_process_zero():
            (stage.folder / "training_args.bin").unlink()  # a pickle, and it names this machine
        return
    adapter = stage.folder / "adapter"
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        (adapter / "training_args.bin").unlink()
        (adapter / "README.md").unlink(missing_ok=True)  # peft's empty card
        model = merged_model(adapter, stage, trainer.accelerator.unwrap_model(trainer.model))
        model.save_pretrained(stage.folder)
        trainer.processing_class.save_pretrained(stage.folder)
    trainer.accelerator.wait_for_everyone()


def _finish_folder(stage: Stage, record: dict[str, Any]) -> None:
    path = stage.folder / "config.json"
    config = json.loads(path.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in config:
        config["rope_theta"] = theta  # readers before transformers 5 look for it here
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (stage.folder / "README.md").write_text(model_card(stage, record))


def _summary(stage: Stage, record: dict[str, Any], steps: int) -> str:
    loss = ""
    if record["eval_loss"] is not None:
        loss = f", validation loss {record['eval_loss_before']:.4f} → {record['eval_loss']:.4f}"
    return (
        f"{stage.name}: {steps:,} steps, {record['tokens']:,} tokens in {record['seconds']:,.0f} s"
        f"{loss}; saved in {stage.folder}"
    )


def _write_recipe(recipe: Recipe) -> None:
    recipe.folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)
    (recipe.folder / "recipe.yaml").write_text(text, encoding="utf-8")
