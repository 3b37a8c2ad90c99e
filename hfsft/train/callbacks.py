"""Callbacks: signals, the log files, the console, and trackers that may fail."""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from hfsft.errors import Interrupted, first_line
from hfsft.process import unignored
from hfsft.process_group import from_main
from hfsft.run.files import read_json_lines, write_text_atomically
from hfsft.terminal import Terminal
from hfsft.train.advice import Advice


class StopOnSignal(TrainerCallback):
    """On a signal finish the step, save a checkpoint and stop; on a second one abandon the step.

    A terminal's signal and the copy that a launcher forwards count as one if they arrive together.
    Signals that the process was started to ignore stay ignored, as SIGHUP under nohup.
    """

    TOGETHER = 1.0  # seconds

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.received = 0  # the first signal's number
        self.times: list[float] = []
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Install the handlers, which only the main thread can."""
        with contextlib.suppress(ValueError):
            for number in unignored():
                self.before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.times and now - self.times[-1] < self.TOGETHER:
            return
        self.times.append(now)
        self.received = self.received or number
        if len(self.times) > 2:
            raise Interrupted("stopped without saving, after three signals", number)

    @property
    def impatient(self) -> bool:
        """Whether a second signal came, and no other rank waits for this step."""
        return len(self.times) > 1 and self.accelerator.num_processes == 1

    def on_step_end(self, args, state, control, **kwargs):
        """Stop at the same step on every rank."""
        if state.global_step < state.max_steps and self.any_rank_signalled():
            control.should_save = True
            control.should_training_stop = True

    def any_rank_signalled(self) -> bool:
        """Whether any rank received a signal; a collective, so every rank must call it."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([self.received], device=self.accelerator.device)
            self.received = int(self.accelerator.gather(flag).max())
        return bool(self.received)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class StepLog:
    """A log file with one JSON object per line, each with its `step`."""

    def __init__(self, path: Path, writes: bool):
        """Read the existing lines, skipping one that a kill left half written.

        Args:
            path: the file.
            writes: whether this process is the one that writes it.
        """
        self.path, self.writes = path, writes
        self.lines = [line for line in read_json_lines(path) if type(line.get("step")) is int]

    def text(self) -> str:
        """The content of the file."""
        return "".join(json.dumps(line) + "\n" for line in self.lines)

    def restore(self, copy: Path) -> bool:
        """Take the lines of a checkpoint's copy where the file has lost some of them.

        Args:
            copy: of the file as it was when the checkpoint was written; need not exist.

        Returns:
            Whether lines had been lost.
        """
        saved = [json.dumps(line) for line in read_json_lines(copy)]
        # compared as text, in which NaN equals NaN
        if [json.dumps(line) for line in self.lines[: len(saved)]] == saved:
            return False
        self.lines = read_json_lines(copy)
        return True

    def keep(self, step: int) -> None:
        """Drop the lines after a step and rewrite the file atomically."""
        self.lines = [line for line in self.lines if line["step"] <= step]
        if self.writes:
            write_text_atomically(self.path, self.text())

    def append(self, line: dict[str, Any]) -> None:
        """Append a line, in memory and to the file."""
        self.lines.append(line)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class MetricsCallback(TrainerCallback):
    """Writes every logged number to `metrics.jsonl`, and owns the files of validation.

    `validation.jsonl` has the loss of each held-out document, also of those that `replay` holds
    out, `samples.jsonl` the answers to the sample prompts.
    """

    # totals of the trainers, which each line's own `tokens` and `seconds` replace
    LEFT_OUT = ("num_tokens", "num_input_tokens_seen", "total_flos", "eval_num_tokens")

    def __init__(self, folder: Path, writes: bool):
        self.metrics = StepLog(folder / "metrics.jsonl", writes)
        self.validation = StepLog(folder / "validation.jsonl", writes)
        self.samples = StepLog(folder / "samples.jsonl", writes)
        # of the validation that is about to be logged
        self.advice: Advice | None = None
        self.sample_seconds = self.began_validation = 0.0
        self.began = 0.0
        self.earlier_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the lines up to the checkpoint that the run resumes from."""
        self.began = time.perf_counter()
        step = state.global_step
        self.metrics.keep(step or -1)  # without a checkpoint none
        self.earlier_seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        # a validation ends with its line in metrics.jsonl: without that it is redone
        validated = step if self.has_validation(step) else step - 1
        self.validation.keep(validated)
        self.samples.keep(validated)

    def share_lines(self) -> None:
        """Give every rank rank 0's lines: another machine may not see the files."""
        for log in (self.metrics, self.validation, self.samples):
            log.lines = from_main(lambda log=log: log.lines)

    @property
    def logs(self) -> tuple[StepLog, StepLog, StepLog]:
        """The three files."""
        return self.metrics, self.validation, self.samples

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return self.metrics.lines

    def on_step_end(self, args, state, control, **kwargs):
        """Log the last step, whatever `logging_steps`."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line."""
        if "train_loss" in logs:  # Trainer's summary at the end
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
        if "eval_runtime" in logs:
            line["eval_seconds"] = round(logs["eval_runtime"], 3)
            line["sample_seconds"] = round(self.sample_seconds, 3)
            if self.advice is not None:
                line["advice"] = self.advice.as_data() | {"max_steps": args.max_steps}
        if "loss" in logs:
            line["memory_bytes"] = _memory(args.device)
        self.metrics.append(line)

    def seconds(self) -> float:
        """Seconds since the first step, without the time between an interrupt and a resume."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def has_validation(self, step: int) -> bool:
        """Whether the log has a validation of this step."""
        return any(line["step"] == step for line in self.lines if "eval_loss" in line)

    def values(self, key: str) -> list[float]:
        """Every logged value of one metric, in order."""
        return [line[key] for line in self.lines if key in line]


def _memory(device: torch.device) -> int:
    """Bytes that the process holds: of the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss


class ConsoleCallback(TrainerCallback):
    """A progress bar on a terminal; elsewhere a plain line for each log."""

    def __init__(self, stage: str, metrics_log: MetricsCallback):
        self.stage, self.metrics_log = stage, metrics_log
        self.console = Terminal(markup=False)
        self.progress: Progress | None = None
        self.task: Any = None
        self.began = 0.0
        self.evaluating = 0.0  # seconds of validation, left out of throughput and time left
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
        """Print the loss, throughput and time left, or the validation's loss and advice."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.evaluating += logs.get("eval_runtime", 0.0)
            advice = self.metrics_log.advice
            said = f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}"
            self.say(f"{self.stage} {said if advice is None else advice.says}")
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
            self.say(
                f"{self.stage} step {state.global_step}/{state.max_steps}: {shown}  "
                f"{int(left) // 60}:{int(left) % 60:02} left"
            )

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        console = self.progress.console if self.progress is not None else self.console
        console.print(text, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, which would otherwise leave the cursor hidden."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class GuardedTracker(TrainerCallback):
    """A tracker (TensorBoard, trackio, W&B) whose failure ends its logging, not the training."""

    def __init__(self, tracker: TrainerCallback, say: Callable[[str], None]):
        self.tracker, self.say = tracker, say

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the tracker's own method, unless it has failed before."""
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:  # of a tracker's own code, its files or its server
            name = type(self.tracker).__name__.removesuffix("Callback")
            self.tracker = None
            self.say(f"{name} failed and logs no more: {first_line(error)}")


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(GuardedTracker, _event, partialmethod(GuardedTracker.pass_on, _event))


def guard_trackers(handler: Any, say: Callable[[str], None]) -> None:
    """Put a `GuardedTracker` around every tracker of a trainer.

    Args:
        handler: the trainer's `CallbackHandler`, changed in place.
        say: prints the failure.
    """
    handler.callbacks = [
        GuardedTracker(callback, say)
        if type(callback).__module__.startswith("transformers.integrations")
        else callback
        for callback in handler.callbacks
    ]
