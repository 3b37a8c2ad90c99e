"""Open a stage: libraries, device, folder, resume, plan."""

import gc
import netrc
import os
import sys
import warnings
from dataclasses import replace
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState

from hfsft.hub.push import check_push
from hfsft.recipe.schema import AUTO, Recipe, Stage
from hfsft.run.checkpoint import checkpoints, step_of
from hfsft.run.disk import require_writable
from hfsft.run.record import (
    changed_keys,
    finished_line,
    is_finished,
    only_longer,
    other_settings,
    read_record,
    resume_notice,
    settings_of,
)
from hfsft.train.extending import finish_make_room, go_on_to, make_room, move_aside
from hfsft.train.finishing import lock_stage
from hfsft.train.ranks import watch_ranks

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
        line = resume_notice(stage, record["settings"], settings_of(recipe, stage))
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
    from hfsft.plan.choosing import choose, require_fit, with_settings

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
