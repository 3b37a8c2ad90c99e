"""Open a stage: device, libraries, folder, resume, plan."""

import gc
import netrc
import os
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState

from hfsft.errors import RecipeError
from hfsft.hub.push import check_push
from hfsft.process_group import from_main
from hfsft.recipe.key import AUTO
from hfsft.recipe.schema import PER_PARAMETER, Recipe, Stage
from hfsft.run.disk import require_writable
from hfsft.run.manifest import checkpoints
from hfsft.run.record import (
    changed_keys,
    finished_line,
    is_finished,
    mend_record,
    only_longer,
    other_settings,
    read_record,
    resume_notice,
    settings_of,
)
from hfsft.terminal import say
from hfsft.train.agreement import agree_on_run, receive_start
from hfsft.train.arguments import precision, trains_on_cpu
from hfsft.train.extending import extend, finish_extending
from hfsft.train.folder import lock_stage, move_aside
from hfsft.train.layout import require_layout, require_shardable, uses_deepspeed
from hfsft.train.ranks import watch_launchers, watch_ranks


def open_stage(recipe: Recipe, stage: Stage) -> Stage | None:
    """Prepare this process and the stage's folder for training; every rank calls it.

    Returns:
        The stage with a value for every `auto`; None if it is finished already with the same
        settings.

    Raises:
        RecipeError: if the folder holds a stage of other settings; nothing is touched.
        MemoryShortage: if the plan does not fit.
    """
    set_up_device(stage)
    set_up_libraries(stage)
    agree_on_run(recipe, stage)
    stage = with_known_steps(recipe, stage)
    if not open_folder(recipe, stage):
        return None
    receive_start(recipe, stage)
    chosen = resume_or_extend(recipe, stage)
    stage = from_main(lambda: with_plan(recipe, stage, chosen), "plans", stage.quiet)
    require_shardable(stage)
    return stage


# --- device ---


def set_up_device(stage: Stage) -> None:
    """Join the process group, watch its ranks, set threads or the memory limit, and seed.

    Raises:
        RecipeError: if the processes or the sharding that were asked for are not what runs.
    """
    cpu = trains_on_cpu(stage)
    _require_gpus(stage, cpu)
    # of the group's collectives; transformers reads it only after the group is made
    timeout = timedelta(seconds=stage.trainer.get("ddp_timeout") or 1800)
    # without an accelerator several processes train on the CPU only if Accelerate is told so;
    # DeepSpeed must not be told, only given the backend
    deepspeed = cpu and uses_deepspeed()
    backend = {"backend": "gloo"} if deepspeed else {}
    with watch_launchers(stage.checkpoints):
        try:
            state = PartialState(cpu=cpu and not deepspeed, timeout=timeout, **backend)
        except ImportError:  # of DeepSpeed
            state = PartialState(cpu=True, timeout=timeout)
    watch_ranks(stage.checkpoints)
    layout = require_layout(stage, state._cpu)
    if state.is_main_process and not stage.quiet:
        settings = {key: stage.trainer.get(key) for key in ("bf16", "fp16")}
        half = settings if any(value is not None for value in settings.values()) else precision()
        chosen = next((name for name, used in half.items() if used), "fp32")
        print(f"{stage.name}: {layout}, {state.device.type}, {chosen}", flush=True)
    if state.device.type == "cpu":
        # `accelerate launch` sets OMP_NUM_THREADS to 1 unless it is given a number
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, (cores or 1) // here))
    elif stage.memory_limit is not None and state.device.type == "cuda":
        from hfsft.plan.plan import CUDA_CONTEXT

        total = torch.cuda.get_device_properties(state.device).total_memory
        # the context is on the card too, but not torch's to limit
        share = (stage.memory_limit_bytes - CUDA_CONTEXT) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    transformers.set_seed(stage.seed)


def _require_gpus(stage: Stage, cpu: bool) -> None:
    """Refuse more processes on this machine than it has GPUs."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not cpu and torch.cuda.is_available() and here > torch.cuda.device_count():
        raise RecipeError(
            f"{stage.name}: {here} processes were asked for on this machine, which has "
            f"{torch.cuda.device_count()} GPU(s)\n  A lower --num_processes, or "
            "ACCELERATE_USE_CPU=true for the CPU"
        )


# --- libraries ---


def set_up_libraries(stage: Stage) -> None:
    """Silence the libraries' logs and progress bars, and prepare W&B.

    Args:
        stage: `quiet`, and whether it reports to W&B.
    """
    if gc.get_freeze_count():
        gc.collect()  # an earlier stage's trainer: 1 s, and frozen it would stay for ever
    gc.freeze()  # the million objects of the imports are never garbage
    gc.enable()  # off since `run_main`
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    # peft 0.21 asks transformers by the old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")  # torchao's states
    if stage.quiet or not sys.stdout.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if "wandb" in (stage.trainer.get("report_to") or ()):
        prepare_wandb(stage)


def prepare_wandb(stage: Stage) -> None:
    """Keep W&B's files in the stage's folder; without an API key it logs offline.

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
            print("W&B has no API key (`wandb login`): logging offline; `wandb sync` uploads later")


# --- steps ---


def with_known_steps(recipe: Recipe, stage: Stage) -> Stage:
    """A stage whose steps and their size are numbers; says what follows from the model's size."""
    if stage.tokens_per_step != AUTO and not any(getattr(stage, key) for key in PER_PARAMETER):
        return stage
    from hfsft.plan.horizon import with_horizon

    stage = with_horizon(recipe, stage)
    if PartialState().is_main_process and not stage.quiet:
        print(f"{stage.name}: {stage.max_steps:,} steps of {stage.tokens_per_step:,} tokens")
    return stage


# --- folder ---


def open_folder(recipe: Recipe, stage: Stage) -> bool:
    """Check that the folder can be written and pushed, and move it aside on `--restart`.

    Returns:
        False if the stage is finished already with the same settings: there is nothing to train.

    Raises:
        RecipeError: if it is finished with other settings.
    """
    state = PartialState()

    def is_done() -> bool:
        require_writable(stage.folder)
        finish_extending(stage)
        line = None if recipe.restart else mend_record(stage.folder)
        if line and not stage.quiet:
            say(line)
        done = not recipe.restart and is_finished(recipe, stage)
        if stage.push_to_hub and not done:
            check_push(stage)
        return done

    finished = from_main(is_done, "looks at the folder", stage.quiet)
    if recipe.restart:
        if from_main(stage.checkpoints.exists):
            lock_stage(stage)
        aside = from_main(lambda: move_aside(stage.folder) if stage.folder.exists() else None)
        if aside is not None and state.is_main_process and not stage.quiet:
            say(f"the old {stage.folder} is now {aside}")
    if finished and state.is_main_process and not stage.quiet:
        say(finished_line(stage))
    return not finished


# --- resume ---


def resume_or_extend(recipe: Recipe, stage: Stage) -> dict[str, Any] | None:
    """Check that the stage's checkpoints are of these settings, or extend them to more steps.

    Returns:
        What `auto` settings were when the stage began, which a resumed run keeps; None if it
        starts from step 0.

    Raises:
        RecipeError: if settings differ that change the result.
    """
    folder = stage.folder
    record, found = from_main(lambda: (read_record(folder), checkpoints(stage.checkpoints)))
    if record is not None and (found or record["status"] == "finished"):
        settings = from_main(lambda: settings_of(recipe, stage))
        changed = changed_keys(record["settings"], settings)
        if only_longer(stage, changed):
            extend(recipe, stage, record)
        elif changed:
            raise other_settings(stage, f"stopped at {found[0].name}", changed, record["settings"])
        line = resume_notice(stage, record["settings"], settings)
        if line and PartialState().is_main_process and not stage.quiet:
            say(line)
    return record.get("chosen") if record is not None and found else None


# --- plan ---


def with_plan(recipe: Recipe, stage: Stage, chosen: dict[str, Any] | None) -> Stage:
    """Choose a value for every `auto`, and refuse what does not fit a GPU or `memory_limit`.

    Rank 0 does it for all of them.

    Args:
        recipe: whose stage.
        stage: as the recipe has it.
        chosen: the values of `auto` when the stage started, kept on resume: optimizer states must
            match.

    Raises:
        MemoryShortage: if it does not fit.
    """
    automatic = [key for key, value in stage.trainer.items() if value == AUTO]
    on_gpu = PartialState().device.type == "cuda"
    if not (automatic or on_gpu or stage.memory_limit):
        return stage  # nothing to refuse without a GPU, and a plan takes seconds
    from hfsft.plan.choosing import choose, require_fit, with_settings

    # settings that the recipe gives by now override what was chosen then
    kept = {key: value for key, value in (chosen or {}).items() if key in automatic}
    stage, why = choose(recipe, with_settings(stage, **kept))
    if why and not stage.quiet:
        say(why)
    chosen = {key: stage.trainer[key] for key in automatic}
    return replace(stage, plan=require_fit(recipe, stage).as_data(), chosen=chosen)
