"""What the three stages share: their arguments, beginning and end, and the files they leave."""

import contextlib
import gc
import json
import math
import netrc
import os
import resource
import shlex
import shutil
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
from hfsft.checkpoint import PARTIAL, checkpoints, clear, newest_whole, step_of
from hfsft.corpus import TextStream
from hfsft.disk import (
    SMALL_FILES,
    checkpoint_size,
    model_size,
    most_checkpoints,
    require_room,
    require_writable,
    shown,
    writing_to,
)
from hfsft.errors import Interrupted, RecipeError, Stopped
from hfsft.going_on import finish_make_room, go_on_to, make_room, move_aside, scheduler_settings
from hfsft.keys import AUTO
from hfsft.model import bf16_is_native, merged_model, name_base
from hfsft.push import check_push, report_pushes
from hfsft.recipe import Recipe, Stage, check_tokens_per_step
from hfsft.record import (
    changed_keys,
    finished_line,
    going_on_line,
    is_finished,
    only_longer,
    other_settings,
    read_record,
    settings_of,
    write_record,
)
from hfsft.trainer import StepAbandoned
from hfsft.watchdog import watch_ranks

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
            run_name=f"{stage.folder.parent.name}-{stage.name}",
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
    made.lr_scheduler_kwargs = scheduler_settings(stage, made.max_steps)
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
    watch_ranks(stage.checkpoints)
    if state.device.type == "cpu":
        # `accelerate launch` sets OMP_NUM_THREADS to 1 where it was not told how many
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // state.num_processes))
    elif stage.memory_limit is not None and state.device.type == "cuda":
        total = torch.cuda.get_device_properties(state.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, stage.memory_limit_bytes / total))
    transformers.set_seed(stage.seed)
    if "wandb" in (stage.trainer.get("report_to") or ()):
        prepare_wandb(stage)
    if state.is_main_process:
        require_writable(stage.folder)
        finish_make_room(stage)
    state.wait_for_everyone()
    finished = not recipe.restart and is_finished(recipe, stage)
    if stage.push_to_hub and state.is_main_process and not finished:
        check_push(stage)
    if recipe.restart:
        if stage.checkpoints.exists():
            lock_stage(stage)
        with state.main_process_first():
            if state.is_main_process:
                _move_aside(stage)
    if finished:
        if state.is_main_process and not stage.quiet:
            print(finished_line(stage))
        return None
    record, found = read_record(stage.folder), checkpoints(stage.checkpoints)
    if record is not None and (found or record["status"] == "finished"):
        changed = changed_keys(record["settings"], settings_of(recipe, stage))
        if only_longer(stage, changed):
            _go_on_to(recipe, stage, record)
        elif changed:
            raise other_settings(stage, f"stopped at {found[0].name}", changed)
        line = going_on_line(stage, record["settings"], settings_of(recipe, stage))
        if line and state.is_main_process and not stage.quiet:
            print(line)
    return _planned(recipe, stage, record["chosen"] if record is not None and found else None)


def _go_on_to(recipe: Recipe, stage: Stage, record: dict[str, Any]) -> None:
    """Make ready to go on to another `max_steps`; the finished stage is moved aside, not lost."""
    checkpoint = go_on_to(stage, record)
    PartialState().wait_for_everyone()
    if checkpoint is not None:
        lock_stage(stage).release()  # every process takes part
    if checkpoint is not None and PartialState().is_main_process:
        # a stage that was killed has told no steps
        reached = record.get("steps", step_of(checkpoints(stage.checkpoints)[0]))
        aside = make_room(recipe, stage, record, checkpoint)
        if not stage.quiet:
            print(
                f"{stage.name}: going on from step {step_of(checkpoint)} to {stage.max_steps}; "
                f"what was trained to step {reached} is now {aside}"
            )
    PartialState().wait_for_everyone()


def _planned(recipe: Recipe, stage: Stage, chosen: dict[str, Any] | None) -> Stage:
    """Settle what is `auto`, and refuse what does not fit a GPU or `memory_limit`.

    A run that goes on keeps what was chosen: another optimizer's states would not load.
    """
    automatic = [key for key, value in stage.trainer.items() if value == AUTO]
    on_gpu = PartialState().device.type == "cuda"
    if not (automatic or on_gpu or stage.memory_limit):
        return stage  # without a GPU there is nothing to refuse, and a plan takes seconds
    from hfsft.memory import choose, require_fit, with_settings

    # what is given by now is taken as it is given
    kept = {key: value for key, value in (chosen or {}).items() if key in automatic}
    stage, why = choose(recipe, with_settings(stage, **kept))
    if why and PartialState().is_main_process and not stage.quiet:
        print(why)
    chosen = {key: stage.trainer[key] for key in automatic}
    return replace(stage, plan=require_fit(recipe, stage).as_data(), chosen=chosen)


def prepare_wandb(stage: Stage) -> None:
    """Keep W&B's files in the stage's folder; without a key it logs offline and asks for none.

    Args:
        stage: reports to it.
    """
    os.environ.setdefault("WANDB_DIR", str(stage.folder))
    try:
        known = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        known = None
    if not (known or {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()):
        os.environ["WANDB_MODE"] = "offline"
        if PartialState().is_main_process and not stage.quiet:
            print("W&B has no key (`wandb login`): it logs offline; `wandb sync` sends it later")


def _on_cpu(stage: Stage) -> bool:
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return wanted or bool(stage.trainer.get("use_cpu")) or not torch.accelerator.is_available()


def _move_aside(stage: Stage) -> None:
    if stage.folder.exists():
        aside = move_aside(stage.folder)
        if not stage.quiet:
            print(f"the old {stage.folder} is now {aside}")


def train_and_save(trainer: Any, recipe: Recipe, stage: Stage) -> None:
    """Train, validate, and leave a whole model folder in the Hub format with its record and card.

    Raises:
        Interrupted: after a signal, once a checkpoint is on disk.
        CheckpointError: if there are checkpoints and none is whole, or none can be written.
        DiskShortage: if the disk has no room for it, or runs full.
    """
    with writing_to(stage.folder):
        lock = lock_stage(stage)
        try:
            _train_and_save(trainer, recipe, stage, lock)
        finally:
            lock.release()


def _train_and_save(trainer: Any, recipe: Recipe, stage: Stage, lock: FileLock) -> None:
    is_main = trainer.is_world_process_zero()
    if is_main and not recipe.ignore_plan:
        _require_room(trainer, stage)
    record = _new_record(trainer, recipe, stage)
    if is_main:
        _write_recipe(recipe)
        write_record(stage.folder, record)
    energy = _energy(trainer.args.device)
    try:
        try:
            _train(trainer, stage)
        except StepAbandoned:
            trainer.save_if_new()
        if trainer.stop_signal.received and not trainer.is_complete():
            record["status"] = "interrupted"
            raise _interrupted(trainer, stage)
        record["status"] = "finished"
        record["energy_joules"] = _energy_since(trainer, energy)
    except BaseException:
        if record["status"] == "running":
            record["status"] = "failed"
        raise
    finally:
        trainer.console.close()
        trainer.stop_signal.give_back()
        record |= _measured(trainer)
        if is_main and record["status"] != "finished":
            with contextlib.suppress(OSError):  # of a full disk; what came before is to be told
                write_record(stage.folder, record)
    partial = stage.checkpoints / PARTIAL
    if is_main:
        clear(stage.checkpoints)  # of a save that was broken off
    _save_model(trainer, stage, partial)
    if is_main:
        _finish_folder(stage, partial, record)
        write_record(stage.folder, record)
        lock.release()
        if not stage.quiet:
            print(_summary(stage, record, trainer.state.global_step))
        if trainer.pusher is not None:
            try:
                trainer.say(f"{stage.name}: pushing to {trainer.pusher.target.repo_id}")
                trainer.pusher.model(stage.folder)
                pushes = trainer.pusher.finish()
            except (KeyboardInterrupt, Stopped) as stop:
                raise Interrupted(
                    f"{stage.name}: stopped while it was pushed; it is finished in {stage.folder}\n"
                    f"  To go on with it: hfsft push {stage.folder}",
                    getattr(stop, "number", signal.SIGINT),
                ) from None
            report_pushes(pushes, stage.folder, trainer.say)


def _require_room(trainer: Any, stage: Stage) -> None:
    """Refuse to train what the disk has no room for, by the sizes of the model that is loaded."""
    small = SMALL_FILES + len(trainer.processing_class.backend_tokenizer.to_str())
    one = small + checkpoint_size(trainer.model, str(trainer.args.optim.value))
    count = most_checkpoints(stage.trainer, trainer.args.max_steps)
    final = small + model_size(trainer.model)
    contents = f"Up to {count} checkpoints of {shown(one)} and the model of {shown(final)}"
    require_room(stage.name, stage.folder, count * one + final, contents)


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
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except StepAbandoned:
        if not trainer.has_every_step() or trainer.stop_signal.received:
            raise
    if trainer.has_every_step() and not trainer.is_complete():
        trainer.evaluate()


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
        "command": shlex.join(["hfsft", stage.name, recipe.path, *_lasting(recipe.arguments)]),
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
        "eval_seconds": round(sum(log.values("eval_seconds")), 1),
        "stopped_at": "plateau" if trainer.is_at_plateau() else None,
        "peak_memory_bytes": memory,
        "peak_memory_of": "GPU reserved" if trainer.args.device.type == "cuda" else "process",
        # what the plan without its overhead is held against
        "peak_allocated_bytes": torch.cuda.max_memory_allocated()
        if trainer.args.device.type == "cuda"
        else None,
    }


def _lasting(arguments: tuple[str, ...]) -> list[str]:
    """A command line without `--restart`, which would begin anew what is to go on."""
    kept: list[str] = []
    for index, word in enumerate(arguments):
        value = index > 0 and arguments[index - 1] == "--restart" and not word.startswith("--")
        if not value and word.partition("=")[0] != "--restart":
            kept.append(word)
    return kept


def _energy(device: torch.device) -> float | None:
    """Joules that a GPU has taken since its driver was loaded; None where it does not tell."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None


def _energy_since(trainer: Any, before: float | None) -> float | None:
    """Joules of a stage that one command ran on one GPU from beginning to end; else not known."""
    if before is None or trainer.place is not None or trainer.args.world_size > 1:
        return None
    return round(_energy(trainer.args.device) - before, 1)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _save_model(trainer: Any, stage: Stage, folder: Path) -> None:
    """Save the plain model to a folder; a LoRA run's adapter goes beside it."""
    trainer.model.config.use_cache = True  # the trainer turned it off, a chat needs it
    if stage.lora is None:
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            (folder / "training_args.bin").unlink()  # a pickle, and it names this machine
        return
    adapter = folder / "adapter"
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        (adapter / "training_args.bin").unlink()
        (adapter / "README.md").unlink(missing_ok=True)  # peft's empty card
        name_base(adapter, stage)
        model = merged_model(adapter, stage, trainer.accelerator.unwrap_model(trainer.model))
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def _finish_folder(stage: Stage, partial: Path, record: dict[str, Any]) -> None:
    """Complete a model's folder, and move what it holds into the stage's."""
    path = partial / "config.json"
    config = json.loads(path.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in config:
        config["rope_theta"] = theta  # readers before transformers 5 look for it here
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").write_text(model_card(stage, record))
    shutil.rmtree(stage.folder / "adapter", ignore_errors=True)  # of a move that was broken off
    # without its config, which comes last, a folder holds no model
    for made in sorted(partial.iterdir(), key=lambda made: made.name == "config.json"):
        made.rename(stage.folder / made.name)
    partial.rmdir()


def _summary(stage: Stage, record: dict[str, Any], steps: int) -> str:
    loss = ""
    if record["eval_loss"] is not None:
        share = record["eval_seconds"] / max(record["seconds"], 1e-9)
        loss = (
            f" ({share:.0%} of them validating), validation loss "
            f"{record['eval_loss_before']:.4f} → {record['eval_loss']:.4f}"
        )
    stopped = f" of {record['max_steps']:,}, at a plateau" if record["stopped_at"] else ""
    return (
        f"{stage.name}: {steps:,} steps{stopped}, {record['tokens']:,} tokens in "
        f"{record['seconds']:,.0f} s{loss}; saved in {stage.folder}"
    )


def _write_recipe(recipe: Recipe) -> None:
    recipe.folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)
    partial = recipe.folder / "recipe.yaml.partial"  # a full disk leaves the one that is there
    partial.write_text(text, encoding="utf-8")
    partial.replace(recipe.folder / "recipe.yaml")
