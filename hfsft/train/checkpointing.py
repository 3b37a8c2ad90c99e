"""Saving and resuming: what a checkpoint holds, and how a run comes back from one.

`ResumableStep` is the second of the three classes behind the trainers, see `step.py`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl

from hfsft.data.stream import TextStream
from hfsft.errors import CheckpointError, ModelError, RecipeError, first_line
from hfsft.hub.push import Pusher
from hfsft.model.loading import name_base
from hfsft.model.optimizer import page_states
from hfsft.plan.sizes import checkpoint_bytes
from hfsft.process_group import from_main, is_shared, meet
from hfsft.recipe.schema import Stage
from hfsft.run.disk import free_bytes, shown
from hfsft.run.manifest import (
    PARTIAL,
    PLACE,
    checkpoints,
    clear,
    commit,
    read_manifest,
    rotate,
    step_of,
)
from hfsft.tokens.encoding import tokenizer_key
from hfsft.train.agreement import agree, weights_digest
from hfsft.train.layout import active_layout, check_resumable
from hfsft.train.schedule import decay_start
from hfsft.train.step import PackedStep, StepAbandoned, last_good_checkpoint


class ResumableStep(PackedStep):
    """A trainer whose checkpoints are complete or absent, and hold all that a resume needs."""

    def __init__(self, stage: Stage, examples: int, length: int | None, **kwargs: Any):
        """Set the trainer up; arguments as `PackedStep`."""
        super().__init__(stage, examples, length, **kwargs)
        self.resumed_from: dict[str, Any] | None = None  # `place.json` of the checkpoint
        self.stream_checkpoint: Path | None = None  # whose random state is still to be loaded
        # goes into the manifest of every checkpoint
        self.layout = active_layout(self.accelerator)
        data = data_fingerprint(self.train_dataset)
        self.manifest_facts = {"data": data, "layout": self.layout.as_data()}
        self._agree(data)
        pushes = stage.push_to_hub and self.is_world_process_zero()
        self.pusher = Pusher(stage) if pushes else None
        # the checkpoint that a longer run resumes from; see extending.py
        self.decay_start = decay_start(stage, self.args.max_steps)
        self.add_callback(ResumeCallback(self))

    def has_every_step(self) -> bool:
        """Whether no step is left to train."""
        return self.state.global_step >= self.args.max_steps

    def _agree(self, data: dict[str, Any]) -> None:
        """Compare what every rank has prepared.

        Raises:
            RecipeError: if a rank differs, or if sharded states have no folder that all see.
        """
        if self.args.world_size == 1:
            return
        facts = {"the training data": data["digest"]}
        facts["the tokenizer"] = tokenizer_key(self.processing_class)
        agree(self.stage, facts, "Every machine needs the same files, or the same Hub revision")
        if not self.is_sharded():
            facts = {"the model's weights": weights_digest(self.model)}
            agree(self.stage, facts, "Every machine needs the same model to start from")
        needs = self.layout.kind if self.is_sharded() else None
        if self.args.load_best_model_at_end:
            needs = "load_best_model_at_end"
        if needs and not is_shared(self.stage.checkpoints):
            raise RecipeError(
                f"{self.stage.name}: {needs} needs a folder that every machine sees, and "
                f"{self.stage.checkpoints} is not\n  Give an output_dir on a shared disk"
            )

    # --- saving ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint into a partial folder, and rename it when all of it is on disk.

        Raises:
            CheckpointError: if it cannot be written, unless an earlier one verifies and the recipe
                has `on_save_error: continue`.
        """
        folder, main = self.stage.checkpoints, self.is_world_process_zero()
        partial, final = folder / PARTIAL, folder / f"checkpoint-{self.state.global_step}"
        self.require_finite()
        # the sums behind the next log line, of every rank
        sums = gather_object([(self._tr_loss.item(), self.correct.item(), self.predicted)])
        problem = None
        try:
            if main:
                clear(folder)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write_state(partial, sums)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = first_line(error)  # torch reports a full disk as "unexpected pos"
        self.accelerator.wait_for_everyone()
        if main and problem is None:
            try:
                commit(partial, final, self.manifest_facts | {"step": self.state.global_step})
                if self.pusher is not None:
                    self.pusher.checkpoint(final)
                needed = {self.state.best_global_step, self.decay_start}
                rotate(folder, self.args.save_total_limit, needed)
            except OSError as error:
                problem = first_line(error)
        meet("hashes the checkpoint", self.stage.quiet)
        problem = next(filter(None, gather_object([problem])), None)
        if problem is not None:
            self._report_failed_save(final, problem)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step."""
        self._save_checkpoint(self.model_wrapped, None)

    def save_if_new(self) -> None:
        """Write a checkpoint of the current step, unless there is one."""
        step = self.state.global_step
        if step and step not in from_main(
            lambda: list(map(step_of, checkpoints(self.stage.checkpoints)))
        ):
            self.save_checkpoint()

    def _write_state(self, partial: Path, sums: list[tuple[float, float, int]]) -> None:
        """Write weights, optimizer, schedule, gradient scaler, random states and `place.json`."""
        self.save_model(str(partial), _internal_call=True)
        self._save_optimizer_and_scheduler(str(partial))
        self._save_scaler(str(partial))
        if not self.is_world_process_zero():
            return
        self._save_rng_state(str(partial))  # Trainer's; a step derives its own numbers
        (partial / "training_args.bin").unlink()  # a pickle that nothing reads
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty card
        if self.stage.lora is not None:
            name_base(partial, self.stage)
        for log in self.metrics_log.logs:
            (partial / log.path.name).write_text(log.text(), encoding="utf-8")
        (partial / PLACE).write_text(json.dumps(self._resume_state(sums)) + "\n")
        if best := self.state.best_global_step:
            # the name alone: a path of this machine would be pushed to the Hub
            self.state.best_model_checkpoint = f"checkpoint-{best}"
        # a fresh control: what was due at this step is not due again after a resume
        for callback in [*self.callback_handler.callbacks, TrainerControl()]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self._point_to_best()

    def _resume_state(self, sums: list[tuple[float, float, int]]) -> dict[str, Any]:
        """What Trainer does not keep: sums of the log, a stream's position, the micro-batch."""
        state = {
            "logged_at": self._globalstep_last_logged,
            "sums": sums,
            "bad_steps": self.bad_steps,
            "rows": self.rows,
            "asked_rows": self.args.per_device_train_batch_size,
            "validated_on": len(self.eval_dataset) if self.stage.validates else 0,
        }
        if isinstance(self.train_dataset, TextStream):
            examples = self.state.global_step * self.get_total_train_batch_size(self.args)
            state["stream"] = self.train_dataset.state_after(examples)
        return state

    def _point_to_best(self) -> None:
        """Name the best checkpoint by its path, where Trainer loads it from after training."""
        if best := self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.stage.checkpoints / f"checkpoint-{best}")

    def require_finite(self) -> None:
        """Check that every weight is finite, before training and before each save; a collective.

        Raises:
            CheckpointError: if one is not; with the stage's last good checkpoint.
            ModelError: if it is one of the model that the stage starts from.
        """
        own = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        broken = torch.stack([~p.isfinite().all() for p in own]).sum()
        # before a sharded run begins, the model is still on the CPU
        if int(self.accelerator.reduce(broken.to(self.args.device))) == 0:
            return
        stage, step = self.stage, self.state.global_step
        if step == 0:
            raise ModelError(
                f"{stage.name}: {stage.model_name_or_path or 'the model'} has a weight that is not "
                "a finite number\n  Start from another model, or train that one again"
            )
        raise CheckpointError(
            f"{stage.name}: a weight is not a finite number at step {step}, which is not saved; "
            f"{last_good_checkpoint(stage)}"
        )

    def _report_failed_save(self, final: Path, problem: str) -> None:
        if self.is_world_process_zero():
            clear(self.stage.checkpoints)
        needed = checkpoint_bytes(self.model, self.optimizer)
        last = from_main(lambda: last_good_checkpoint(self.stage))
        message = (
            f"{self.stage.name}: cannot save {final}: {problem}\n"
            f"  {shown(free_bytes(final))} are free on its disk, and a checkpoint takes about "
            f"{needed / 1e6:,.0f} MB; {last}"
        )
        if self.stage.on_save_error == "stop" or last.startswith("there"):
            raise CheckpointError(message)
        self.say(f"{message}; training continues")

    # --- resuming ---

    def prepare_resume(self, checkpoint: Path) -> None:
        """Read what Trainer does not keep, before `train` resumes.

        Raises:
            CheckpointError: if the data is not what the checkpoint was trained on, or its layout is
                another one that it cannot be loaded into.
        """
        manifest = read_manifest(checkpoint)
        check_resumable(checkpoint, manifest, self.layout)
        then = manifest["data"]
        if then != data_fingerprint(self.train_dataset, then["examples"]):
            raise CheckpointError(
                f"{self.stage.name}: the data has changed since {checkpoint} was written\n"
                "  Give this run another --name, or pass --restart, which moves the old stage aside"
            )
        for log in self.metrics_log.logs:
            if log.restore(checkpoint / log.path.name):
                self.say(f"{log.path} lacked lines; they are restored from {checkpoint}")
        self.resumed_from = json.loads((checkpoint / PLACE).read_text())
        if "stream" in self.resumed_from:
            self.train_dataset.resume(self.resumed_from["stream"])
            self.stream_checkpoint = checkpoint
        if self.resumed_from["rows"] < self.resumed_from["asked_rows"]:  # memory had run out
            self.rows = min(self.rows, self.resumed_from["rows"])

    def restore_sums(self) -> None:
        """Restore the sums of the next log line, which `train` has just set to zero."""
        self._point_to_best()
        if self.resumed_from is not None:
            self._globalstep_last_logged = self.resumed_from["logged_at"]
            self.bad_steps = self.resumed_from["bad_steps"]
            sums = share_of_sums(self.resumed_from["sums"], self.args.world_size)
            loss, correct, self.predicted = sums[self.args.process_index]
            self._tr_loss.fill_(loss)
            self.correct.fill_(correct)

    def restore_pages(self) -> None:
        """Move the states that `train` has loaded to paged memory, for a paged optimizer."""
        optim = str(self.stage.trainer.get("optim"))
        if self.resumed_from is not None and optim.startswith("paged"):
            page_states(self.optimizer.optimizer)

    def restore_stream_rng(self) -> None:
        """Load a stream's random states, which Trainer restores only where it skips data."""
        if self.stream_checkpoint is not None:
            self._load_rng_state(str(self.stream_checkpoint))
            self.stream_checkpoint = None


class ResumeCallback(TrainerCallback):
    """Restores what Trainer resets, and saves before the learning rate decays."""

    def __init__(self, trainer: ResumableStep):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the sums of the log, and paged memory."""
        self.trainer.restore_sums()
        self.trainer.restore_pages()

    def on_step_begin(self, args, state, control, **kwargs):
        """Restore a stream's random states; take no step where none is left."""
        self.trainer.restore_stream_rng()
        # interrupted after the last step: Trainer would otherwise run an extra one
        if self.trainer.has_every_step():
            raise StepAbandoned

    def on_step_end(self, args, state, control, **kwargs):
        """Save the last checkpoint before the decay, which a longer run can resume from."""
        if state.global_step == self.trainer.decay_start and args.save_strategy != "no":
            control.should_save = True


def share_of_sums(sums: list[list[float]], ranks: int) -> list[list[float]]:
    """The sums behind the next log line for another number of ranks; unchanged for the same.

    Args:
        sums: of each rank that saved: its loss, which the log averages over ranks; its top-1
            predictions and trained tokens, which the log adds up.
        ranks: that resume.
    """
    if len(sums) == ranks:
        return sums
    losses, correct, predicted = zip(*sums, strict=True)
    loss = sum(losses) / len(losses)
    return [[loss, sum(correct), sum(predicted)]] + [[loss, 0.0, 0]] * (ranks - 1)


def data_fingerprint(train: Any, examples: int | None = None) -> dict[str, Any]:
    """The size and digest of a training set, to notice on resume that it changed.

    Args:
        train: sft's examples of the whole run, rows of mid or base, or a stream.
        examples: how many examples to hash; None: all.

    Returns:
        `examples` and their `digest`; both None for a stream.
    """
    if isinstance(train, TextStream):
        return {"examples": None, "digest": None}
    count = len(train) if examples is None else min(examples, len(train))
    digest, hashed = hashlib.blake2b(digest_size=16), count
    if isinstance(train, datasets.Dataset):
        if "labels" not in train.column_names:
            # the fingerprint of base text stands for its sources, tokenizer and row length; some
            # rows are hashed as well, as the code that makes them may have changed
            digest.update(train._fingerprint.encode())
            hashed = min(count, 1000)
        for table in train.select(range(hashed)).with_format("arrow").iter(batch_size=1000):
            for name in sorted({"input_ids", "labels"} & set(table.column_names)):
                values = table[name].combine_chunks()
                digest.update(values.value_lengths().to_numpy())
                digest.update(values.flatten().to_numpy())
    else:
        for row in map(train.__getitem__, range(count)):
            digest.update(np.asarray([row["input_ids"], row["labels"]], dtype=np.int32))
    return {"examples": count, "digest": digest.hexdigest()}
