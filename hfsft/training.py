"""What the three stages share: arguments, callbacks, the order of examples, and files left."""

import contextlib
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from hfsft.conversations import IGNORED
from hfsft.corpus import TextStream
from hfsft.errors import Interrupted, RecipeError
from hfsft.model import bf16_is_native, merged_model
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


def arguments(stage: Stage, train: Any, row_length: int | None = None) -> TrainingArguments:
    """The trainer's arguments: the recipe's, with what hfsft derives from them.

    Args:
        stage: its `trainer` settings are passed through untouched.
        train: the training set, for the length of an epoch.
        row_length: tokens a row (base, mid), to turn `tokens_per_step` into accumulation steps.

    Returns:
        `TrainingArguments`, for sft an `SFTConfig`.

    Raises:
        RecipeError: if the step does not divide over the devices, or upstream refuses the settings.
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
    accumulation = accumulation_steps(stage, row_length)
    on_cpu = PartialState().device.type == "cpu"
    if not stage.validates:
        settings["eval_strategy"] = "no"
        settings.pop("eval_steps", None)
    try:
        made = config_class(
            output_dir=str(stage.checkpoints),
            seed=stage.seed,
            gradient_accumulation_steps=accumulation,
            disable_tqdm=True,  # ConsoleCallback draws the bar
            include_num_input_tokens_seen="non_padding",
            eval_on_start=stage.validates and last_checkpoint(stage) is None,
            ignore_data_skip=isinstance(train, TextStream),  # it goes on from its own state
            logging_nan_inf_filter=False,  # it logs a NaN as the mean of the losses before
            **{"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu} | settings,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
    examples = accumulation * made.per_device_train_batch_size * made.world_size
    if stage.max_steps is not None:
        made.max_steps = stage.max_steps
    elif isinstance(train, TextStream):
        raise RecipeError(f"{stage.name}: a stream has no epochs; give max_steps")
    else:
        made.max_steps = max(1, math.ceil(len(train) * made.num_train_epochs / examples))
    return made


def accumulation_steps(stage: Stage, row_length: int | None = None) -> int:
    """Micro-batches an optimizer update on each device.

    Raises:
        RecipeError: if the step does not divide over the devices and their batches.
    """
    batch, processes = stage.trainer["per_device_train_batch_size"], PartialState().num_processes
    if stage.name == "sft":
        if stage.examples_per_step % (batch * processes):
            raise RecipeError(
                f"sft.examples_per_step: {stage.examples_per_step} is no multiple of "
                f"{batch} examples on {processes} devices; set per_device_train_batch_size to a "
                f"divisor of {stage.examples_per_step / processes:g}"
            )
        return stage.examples_per_step // (batch * processes)
    if stage.tokens_per_step is None:
        return 1
    return check_tokens_per_step(
        stage.name, stage.tokens_per_step, batch, row_length, processes, "recipe"
    )


# --- trainers ---


class StepSampler(torch.utils.data.Sampler):
    """The order of examples over the whole run: one seeded permutation after another.

    Every step then has its full number of examples, also where an epoch ends within it, and neither
    the device batch, nor the number of processes, nor a larger `max_steps` changes the order.
    """

    def __init__(self, examples: int, total: int, seed: int):
        self.examples, self.total, self.seed = examples, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        given, epoch = 0, 0
        while given < self.total:
            order = list(range(self.examples))
            random.Random(f"{self.seed}:epoch:{epoch}").shuffle(order)
            yield from order[: self.total - given]
            given, epoch = given + len(order), epoch + 1


class _StageMixin:
    """What hfsft changes in a trainer: the order of examples, and who draws the progress."""

    def __init__(self, stage: Stage, **kwargs: Any):
        try:
            super().__init__(**kwargs)
        except (ValueError, ImportError, RuntimeError) as error:
            raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.stage = stage
        self.stop_signal = StopOnSignal(self.accelerator)
        self.metrics_log = MetricsCallback(stage.folder / "metrics.jsonl")
        self.add_callback(self.stop_signal)
        if isinstance(self.train_dataset, TextStream):
            self.add_callback(StreamCallback(self.train_dataset))
        self.add_callback(self.metrics_log)
        if not stage.quiet:
            self.add_callback(ConsoleCallback(stage.name))

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        total = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return StepSampler(len(dataset), total, self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """This process's share of the held-out examples: every n-th, none twice."""
        dataset = self.eval_dataset
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, "evaluation")
        share = range(self.args.process_index, len(dataset), self.args.world_size)
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(dataset, share or [0]),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
        )

    def evaluation_loop(
        self, dataloader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean loss a trained token, the same whatever the batch and the number of processes.

        The stock loop averages over batches, and repeats examples to even the processes out.
        """
        args, examples = self.args, len(self.eval_dataset)
        share = len(range(args.process_index, examples, args.world_size))
        own = math.ceil(share / args.eval_batch_size)
        longest = math.ceil(math.ceil(examples / args.world_size) / args.eval_batch_size)
        totals = torch.zeros(2, dtype=torch.float64, device=args.device)  # loss, trained tokens
        self.model.eval()
        # every process makes as many forward passes as the longest: sharded weights need it
        for index, inputs in enumerate(itertools.islice(itertools.cycle(dataloader), longest)):
            inputs = self._prepare_inputs(inputs)
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs)
            if index < own:
                totals += torch.stack([loss.double() * tokens, tokens.double()])
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        loss, tokens = self.accelerator.reduce(totals).tolist()
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": loss / max(tokens, 1)},
            num_samples=examples,
        )


class StageTrainer(_StageMixin, Trainer):
    """The trainer of base and mid."""


class SFTStageTrainer(_StageMixin, SFTTrainer):
    """The trainer of sft."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave out trl's card at every checkpoint: the finished stage gets its own."""


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM finish the step, save a checkpoint, stop; a second stops at once."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.received = 0
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the signals over; a thread that is not the main one cannot."""
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        """Stop at the same step on every process."""
        received = self.received
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([received], device=self.accelerator.device)
            received = int(self.accelerator.gather(flag).max())
        if received and state.global_step < state.max_steps:
            self.received = received
            control.should_save = True
            control.should_training_stop = True

    def give_back(self) -> None:
        """Put the signals' former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class MetricsCallback(TrainerCallback):
    """Write every logged number to `metrics.jsonl`, one JSON object a line."""

    # of the trainers' own: totals that the lines' own `tokens` and `seconds` say better
    LEFT_OUT = ("num_tokens", "num_input_tokens_seen", "total_flos", "eval_num_tokens")

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.began = 0.0
        self.earlier_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the lines up to the checkpoint that the run goes on from."""
        self.began = time.perf_counter()
        if self.path.is_file():
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line]
            self.lines = [line for line in lines if line["step"] <= state.global_step]
        if state.global_step == 0:
            self.lines = []
        self.earlier_seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def on_step_end(self, args, state, control, **kwargs):
        """Log the last step, whatever `logging_steps`."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line."""
        if "train_loss" in logs:  # the summary at the end
            return
        line = {
            "step": state.global_step,
            **{
                key: value
                for key, value in logs.items()
                if key not in self.LEFT_OUT
                and not key.endswith(("_runtime", "_per_second", "epoch"))
            },
            "tokens": state.num_input_tokens_seen,
            "seconds": round(self.seconds(), 3),
        }
        self.lines.append(line)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def seconds(self) -> float:
        """Seconds since the stage's first step, without the time between two commands."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def values(self, key: str) -> list[float]:
        """Every logged value of one metric, in order."""
        return [line[key] for line in self.lines if key in line]


class StreamCallback(TrainerCallback):
    """Keep a stream's place in every checkpoint, and go on from it."""

    FILE = "stream.json"

    def __init__(self, stream: TextStream):
        self.stream = stream

    def on_save(self, args, state, control, **kwargs):
        """Write the place behind the last row that was trained on."""
        if state.is_world_process_zero:
            step = args.per_device_train_batch_size * args.gradient_accumulation_steps
            rows = state.global_step * step * args.world_size
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / self.FILE).write_text(json.dumps(self.stream.state_after(rows)) + "\n")

    def go_on(self, checkpoint: str) -> None:
        """Set the stream to the place that a checkpoint holds."""
        self.stream.go_on(json.loads((Path(checkpoint) / self.FILE).read_text()))


class ConsoleCallback(TrainerCallback):
    """A progress bar on a terminal; elsewhere one plain line a log."""

    def __init__(self, stage: str):
        self.stage = stage
        self.console = Console()
        self.progress: Progress | None = None
        self.task: Any = None
        self.began = 0.0
        self.evaluating = 0.0  # seconds of them, left out of tokens/s and the time left
        self.first_step = self.first_tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Show the bar."""
        if not state.is_world_process_zero:
            return
        self.began, self.first_step = time.perf_counter(), state.global_step
        self.first_tokens, self.evaluating = state.num_input_tokens_seen, 0.0
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task(
                self.stage, total=state.max_steps, completed=state.global_step, shown=""
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Say the loss, tokens/s and the time left; or the validation's loss."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.evaluating += logs.get("eval_runtime", 0.0)
            self._say(
                f"{self.stage} step {state.global_step}: validation loss {logs['eval_loss']:.4f}"
            )
        if "loss" not in logs:
            return
        seconds = max(time.perf_counter() - self.began - self.evaluating, 1e-9)
        speed = (state.num_input_tokens_seen - self.first_tokens) / seconds
        done = max(state.global_step - self.first_step, 1)
        left = (state.max_steps - state.global_step) * seconds / done
        shown = f"loss {logs['loss']:.4f}  {speed:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self.task, shown=shown)
        else:
            self._say(
                f"{self.stage} step {state.global_step}/{state.max_steps}: {shown}  "
                f"{int(left) // 60}:{int(left) % 60:02} left"
            )

    def _say(self, text: str) -> None:
        console = self.progress.console if self.progress is not None else self.console
        console.print(text, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


# --- a stage's beginning and end ---


def open_stage(recipe: Recipe, stage: Stage) -> bool:
    """Begin a stage: set the libraries' voices, seed, and look at what the folder holds.

    Returns:
        False if the stage is finished already, with the same settings: there is nothing to do.

    Raises:
        RecipeError: if the folder holds a stage of other settings; nothing is touched.
    """
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
    if recipe.restart:
        with state.main_process_first():
            if state.is_main_process:
                _move_aside(stage.folder)
    if is_finished(recipe, stage):
        if state.is_main_process and not stage.quiet:
            print(finished_line(stage))
        return False
    record, checkpoint = read_record(stage.folder), last_checkpoint(stage)
    if record is not None and checkpoint is not None:
        changed = changed_keys(record["settings"], settings_of(recipe, stage))
        if changed:
            raise other_settings(stage, f"stopped at {Path(checkpoint).name}", changed)
    return True


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


def last_checkpoint(stage: Stage) -> str | None:
    """The newest checkpoint of a stage, or None."""
    return get_last_checkpoint(str(stage.checkpoints)) if stage.checkpoints.is_dir() else None


def train_and_save(trainer: Any, recipe: Recipe, stage: Stage) -> None:
    """Train, validate, and leave a whole model folder in the Hub format with its record and card.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is on disk.
    """
    is_main = trainer.is_world_process_zero()
    record = _new_record(trainer, recipe, stage)
    if is_main:
        _write_recipe(recipe)
        write_record(stage.folder, record)
    try:
        checkpoint = last_checkpoint(stage)
        if checkpoint is not None and isinstance(trainer.train_dataset, TextStream):
            StreamCallback(trainer.train_dataset).go_on(checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_signal.received and trainer.state.global_step < trainer.args.max_steps:
            record["status"] = "interrupted"
            name = signal.Signals(trainer.stop_signal.received).name
            raise Interrupted(
                f"{stage.name} stopped by {name} at step {trainer.state.global_step} of "
                f"{trainer.args.max_steps}, saved in {last_checkpoint(stage)}\n"
                "  The same command goes on from there",
                trainer.stop_signal.received,
            )
        evaluated = [line["step"] for line in trainer.metrics_log.lines if "eval_loss" in line]
        if stage.validates and trainer.args.max_steps not in evaluated:
            trainer.evaluate()
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
    _save_model(trainer, stage)
    if is_main:
        _finish_folder(stage, record)
        write_record(stage.folder, record)
        if not stage.quiet:
            print(_summary(stage, record, result.global_step))


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
        "examples": state.global_step * trainer.get_total_train_batch_size(trainer.args),
        "tokens": state.num_input_tokens_seen,
        "seconds": round(log.seconds(), 1) if log.began else 0.0,
        "train_loss": losses[-1] if losses else None,
        "eval_loss": validation[-1] if validation else None,
        "eval_loss_before": validation[0] if validation else None,
        "peak_memory_bytes": memory,
        "peak_memory_of": "GPU reserved" if trainer.args.device.type == "cuda" else "process",
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


def model_card(stage: Stage, record: dict[str, Any]) -> str:
    """The model card of a finished stage, in the Hub's format."""
    from huggingface_hub import ModelCardData

    base = stage.model_name_or_path
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfsft", stage.name],
        base_model=base if base and not Path(base).is_dir() else None,
    )
    losses = "not validated"
    if record["eval_loss"] is not None:
        losses = f"{record['eval_loss_before']:.4f} before, {record['eval_loss']:.4f} after"
    sources = "\n".join(f"- {source}" for source in dict.fromkeys(map(str, stage.data)))
    messages = '[{"role": "user", "content": "Who are you?"}]'
    return f"""---
{data.to_yaml()}
---

# {stage.folder.parent.name}/{stage.name}

The {stage.name} stage of a small chat model, trained with hfsft {record["versions"]["hfsft"]}.

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{stage.folder.as_posix()}")
print(chat({messages})[0]["generated_text"][-1]["content"])
```

| | |
|---|---|
| started from | {base or "a fresh model"} |
| parameters | {record["parameters"]:,} ({record["trained_parameters"]:,} trained) |
| steps | {record["steps"]:,} of {record["examples_per_step"]:,} examples |
| tokens | {record["tokens"]:,} |
| validation loss | {losses} |
| time | {record["seconds"]:,.0f} s on {record["device"]}, {record["precision"]} |
| peak memory | {record["peak_memory_bytes"] / 2**30:.2f} GiB ({record["peak_memory_of"]}) |

Data:

{sources}

The recipe is `recipe.yaml` in the run's folder; versions and settings are in `stage.json`.
"""


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
