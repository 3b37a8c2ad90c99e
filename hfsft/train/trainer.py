"""The trainers: transformers' and trl's, with hfsft's step, order of examples and validation."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import (
    ExportableState,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
)
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from hfsft.data.order import RunOrder
from hfsft.data.packing import PackedConversations, StepCollator, micro_batches, model_inputs
from hfsft.data.stream import TextStream
from hfsft.errors import CheckpointError, MemoryShortage, RecipeError, TrainingError, first_line
from hfsft.hub.push import Pusher
from hfsft.model.attention import packed_attention
from hfsft.model.head import fuse_head
from hfsft.model.loading import name_base
from hfsft.plan.sizes import checkpoint_bytes
from hfsft.recipe.schema import Stage
from hfsft.run.checkpoint import (
    PARTIAL,
    PLACE,
    checkpoints,
    clear,
    commit,
    newest_whole,
    read_manifest,
    rotate,
    step_of,
)
from hfsft.run.disk import free_bytes, shown
from hfsft.tokens.encoding import IGNORED
from hfsft.tokens.templates import prompt_text
from hfsft.train.advice import Advice, Validation, advise
from hfsft.train.callbacks import ConsoleCallback, MetricsCallback, StopOnSignal
from hfsft.train.held_out import (
    HeldOut,
    attention_of,
    documents_within,
    evaluations,
    greedy_answers,
    validation_metrics,
)
from hfsft.train.saving import data_fingerprint
from hfsft.train.schedule import decay_start
from hfsft.train.step import StepAbandoned, StepSampler, get_cuda_rng_state

BAD_STEPS = "bad_steps.jsonl"  # steps that were left out, and their examples


EVAL_EXAMPLES = 64  # held-out examples that are laid into rows together


class _StageMixin:
    """What hfsft changes in a trainer: the step, the order of examples, validation, the console."""

    def __init__(self, stage: Stage, examples: int, length: int | None, **kwargs: Any):
        """Set the trainer up.

        Args:
            stage: the recipe's section.
            examples: of an optimizer step, over all processes.
            length: tokens a row; None: those of the step's longest conversation.
            kwargs: of the `Trainer`; `args.per_device_train_batch_size` are a micro-batch's rows.

        Raises:
            RecipeError: if upstream refuses the settings, or the step does not divide.
        """
        args = kwargs["args"]
        if examples % args.world_size:
            raise RecipeError(
                f"{stage.name}: {examples} examples a step do not divide over {args.world_size} "
                "devices"
            )
        if isinstance(kwargs["train_dataset"], TextStream):
            # it reads ahead by itself, and must know its place
            args.dataloader_num_workers = 0
            args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False
        collator = StepCollator(kwargs["processing_class"].pad_token_id, length)
        try:
            super().__init__(data_collator=collator, **kwargs)
        except (ValueError, ImportError, RuntimeError) as error:
            raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(stage.folder / "tensorboard")
        self.stage = stage
        self._train_batch_size = examples // args.world_size  # the data loader yields whole steps
        self.rows = args.per_device_train_batch_size  # of a micro-batch; 0: one document each
        self.hits = torch.zeros((), device=args.device)  # tokens that were the likeliest one
        self.hits_of = 0  # trained tokens, since the last log line
        self._choose_step()
        self.stop_signal = StopOnSignal(self.accelerator)
        self.metrics_log = MetricsCallback(stage.folder, self.is_world_process_zero())
        self.console = ConsoleCallback(stage.name, self.metrics_log)
        if stage.validates and self.eval_dataset is not None:
            self._hold_out(HeldOut(self.eval_dataset))
        self.bad_steps = 0  # in a row
        self.place: dict[str, Any] | None = None  # of the checkpoint that the run goes on from
        self.random_states: Path | None = None  # the checkpoint that still has a stream's
        # go into the manifest of every checkpoint
        self.manifest_facts = {"data": data_fingerprint(self.train_dataset)}
        pushes = stage.push_to_hub and self.is_world_process_zero()
        self.pusher = Pusher(stage) if pushes else None
        self.add_callback(self.stop_signal)
        # its checkpoint is kept: a longer run goes on from there
        self.decay_start = decay_start(stage, args.max_steps)
        self.add_callback(self.metrics_log)
        self.add_callback(StageCallback(self))
        if not stage.quiet:
            self.add_callback(self.console)

    # --- the step ---

    def _choose_step(self) -> None:
        """Take the fastest attention and loss that give the model's own loss on a small example."""
        model = self._plain_model()
        self.own_attention = own = model.config._attn_implementation
        half = self.args.bf16 or self.args.fp16 or model.dtype != torch.float32
        fast = packed_attention(model, self.args.device, half, self.data_collator.max_length)
        # trl's own loss, which a model that brings router losses or label smoothing needs
        self.stock = self.label_smoother is not None or getattr(self, "aux_loss_enabled", False)
        dft = getattr(self.args, "loss_type", "nll") == "dft"
        self.fused = not self.stock and fuse_head(model, dft)
        if dft and not self.stock and not self.fused:
            raise RecipeError(f"{self.stage.name}.loss_type: dft needs a model with a linear head")
        if self._is_sharded():  # its weights are not all here to try
            model.set_attn_implementation(fast)
            return
        documents = [list(range(1, 8)), list(range(8, 13)), list(range(13, 16))]
        expected = sum(self._total_loss(model, [ids], fused=False) for ids in documents)
        candidates = [(fast, True), (own, True)] if self.fused else []
        for attention, fused in [*candidates, (own, False)]:
            model.set_attn_implementation(attention)
            error = abs(self._total_loss(model, documents, fused) / expected - 1)
            if error < (2e-2 if half else 1e-4) or (dft and fused):  # dft is another loss
                self.fused = fused
                return
        self.fused, self.data_collator.alone = False, True

    @torch.no_grad()
    def _total_loss(self, model: Any, documents: list[list[int]], fused: bool) -> float:
        model.eval()
        examples = [{"input_ids": ids, "labels": ids} for ids in documents]
        step = StepCollator(0, sum(map(len, documents)))(examples)
        inputs = self._prepare_inputs(model_inputs(step) if fused else step)
        with self.compute_loss_context_manager():
            if fused:
                return model(**inputs)[0].item()
            loss = model(**inputs, use_cache=False).loss
            return loss.item() * (inputs["labels"] != IGNORED).sum().item()

    def _plain_model(self) -> Any:
        """The `PreTrainedModel`, also where LoRA is around it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Whole steps, kept on the CPU, where `training_step` cuts them up without waiting."""
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Trained tokens of the step on all processes."""
        tokens = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        return self.accelerator.reduce(tokens.to(device))

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        """Forward and backward of a whole step; out of memory, the same again in smaller parts.

        Args:
            model: as Accelerate wraps it.
            inputs: as `StepCollator` makes them.
            num_items_in_batch: trained tokens of the step on all processes.

        Returns:
            This process's share of the mean loss a trained token, times the number of processes.

        Raises:
            MemoryShortage: if a single document does not fit.
        """
        before = torch.get_rng_state(), get_cuda_rng_state(), self.hits.clone(), self.hits_of
        while (loss := self._micro_steps(model, inputs, num_items_in_batch)) is None:
            model.zero_grad()
            random_state, cuda_random_state, hits, self.hits_of = before
            self.hits = hits.clone()
            torch.set_rng_state(random_state)
            if cuda_random_state is not None:
                torch.cuda.set_rng_state(cuda_random_state)
            if self.stop_signal.impatient:
                raise StepAbandoned
            self._shrink(inputs)
        self.step_loss = loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Take the gradients away where they are no finite numbers: the update is left out."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = self.accelerator.reduce(self.step_loss)
        checked = loss if self.args.fp16 else loss + grad_norm  # fp16's scaler tries larger norms
        if math.isfinite(checked):
            self.bad_steps = 0
            return grad_norm
        self.bad_steps += 1
        self.optimizer.zero_grad()
        if self.is_world_process_zero():
            self._note_bad_step(loss.item(), float(grad_norm))
        if self.bad_steps == self.stage.max_bad_steps:
            raise TrainingError(
                f"{self.stage.name}: the loss or its gradient was no finite number in "
                f"{self.bad_steps} steps in a row, up to step {self.state.global_step + 1}; "
                f"{self._last_good()}\n  Their examples are in {self.stage.folder / BAD_STEPS}; a "
                "lower learning_rate or max_grad_norm may help"
            )
        return grad_norm

    def _note_bad_step(self, loss: float, grad_norm: float) -> None:
        step, examples = self.state.global_step, self.get_total_train_batch_size(self.args)
        line = {"step": step + 1, "loss": loss, "grad_norm": grad_norm}
        if not isinstance(self.train_dataset, TextStream):
            order = itertools.islice(self._get_train_sampler(), step * examples, None)
            line |= self._named(list(itertools.islice(order, examples)))
        with (self.stage.folder / BAD_STEPS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say(
            f"{self.stage.name} step {step + 1}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: "
            "this update is left out"
        )

    def _named(self, examples: list[int]) -> dict[str, list[Any]]:
        """A step's examples by source and row; of base text, whose rows hold many, their places."""
        dataset = self.train_dataset
        if isinstance(dataset, RunOrder):
            return {"examples": [dataset.origins[example] for example in examples]}
        if isinstance(dataset, PackedConversations):
            items = [item for row in examples for item in dataset.rows[row]]
            return {"examples": [dataset.origins[item] for item in items]}
        return {"rows": examples}

    def _micro_steps(
        self, model: Any, step: dict[str, torch.Tensor], num_items: torch.Tensor
    ) -> torch.Tensor | None:
        """The step in micro-batches of `self.rows` rows; None: out of memory, or told to stop."""
        parts = micro_batches(step, self.rows)
        if self._is_sharded():  # every forward gathers weights: all processes make as many
            count = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
            idle = parts[0] | {"labels": torch.full_like(parts[0]["labels"], IGNORED)}
            parts = [idle] * (int(count.max()) - len(parts)) + parts
        total = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            # processes are synchronised on the last one; DeepSpeed counts for itself
            last = index == len(parts) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            together = last or self.is_deepspeed_enabled
            if self.stop_signal.impatient:
                return None
            try:
                with nullcontext() if together else self.accelerator.no_sync(model):
                    inputs = model_inputs(part) if self.fused else part
                    total += super().training_step(model, inputs, num_items)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.args.world_size > 1 and (together or self._is_sharded()):
                    raise self._shortage(step) from None  # the others wait in the middle of it
                return None
        return total

    def _shrink(self, step: dict[str, torch.Tensor]) -> None:
        if self.rows == 0:
            raise self._shortage(step)
        self.rows = min(self.rows, len(step["input_ids"])) // 2
        clear_device_cache(garbage_collection=True)
        size = {0: "one document", 1: "1 row"}.get(self.rows, f"{self.rows} rows")
        self.say(
            f"{self.stage.name}: out of memory; the step is done again, and from here on, with "
            f"{size} a micro-batch, which leaves its result as it is"
        )

    def say(self, text: str) -> None:
        """Print a line once, unless the stage is quiet."""
        if not self.stage.quiet and self.is_world_process_zero():
            self.console.say(text)

    def _shortage(self, step: dict[str, torch.Tensor]) -> MemoryShortage:
        longest = max(part["input_ids"].shape[1] for part in micro_batches(step, 0))
        limit = f" within memory_limit: {self.stage.memory_limit}" * bool(self.stage.memory_limit)
        return MemoryShortage(
            f"{self.stage.name}: out of memory{limit} with {longest:,} tokens in "
            f"{'a micro-batch' if self.rows else 'one document'} on {self.args.device}\n  "
            "`hfsft plan RECIPE` says which max_length, gradient_checkpointing, optim or lora fits"
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The loss of a micro-batch as its share of the step's."""
        if "targets" not in inputs:
            if self.stock:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        total, hits = model(**inputs)
        self.hits += hits
        self.hits_of += len(inputs["targets"])
        # DDP and FSDP average the gradients of the processes
        return total / num_items_in_batch * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the share of trained tokens that were the model's likeliest one."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself, and NaN stays NaN
        if "loss" in logs and self.fused:
            of = torch.tensor(float(self.hits_of), device=self.args.device)
            hits, of = self.accelerator.reduce(torch.stack([self.hits, of])).tolist()
            logs["mean_token_accuracy"] = hits / max(of, 1)
            self.hits, self.hits_of = torch.zeros_like(self.hits), 0
        super().log(logs, start_time)

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others, and name it one when all of it is on the disk.

        Raises:
            CheckpointError: if it cannot be written, unless an earlier one is whole and the recipe
                says `on_save_error: continue`.
        """
        folder, main = self.stage.checkpoints, self.is_world_process_zero()
        partial, final = folder / PARTIAL, folder / f"checkpoint-{self.state.global_step}"
        if not self._is_finite():
            raise CheckpointError(
                f"{self.stage.name}: a weight is not a finite number at step "
                f"{self.state.global_step}, which is not saved; {self._last_good()}"
            )
        # what is summed up for the next log line, by each process
        sums = gather_object([(self._tr_loss.item(), self.hits.item(), self.hits_of)])
        problem = None
        try:
            if main:
                clear(folder)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write_state(partial, sums)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = first_line(error)  # torch says "unexpected pos" of a full disk
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
        problem = next(filter(None, gather_object([problem])), None)
        if problem is not None:
            self._cannot_save(final, problem)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the step that was reached."""
        self._save_checkpoint(self.model_wrapped, None)

    def _write_state(self, partial: Path, sums: list[tuple[float, float, int]]) -> None:
        """All that the run goes on from: weights, optimizer, schedule, scaler, random states."""
        self.save_model(str(partial), _internal_call=True)
        self._save_optimizer_and_scheduler(str(partial))
        self._save_scaler(str(partial))
        self._save_rng_state(str(partial))
        if not self.is_world_process_zero():
            return
        (partial / "training_args.bin").unlink()  # a pickle that nothing reads
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty card
        if self.stage.lora is not None:
            name_base(partial, self.stage)
        place = {
            "logged_at": self._globalstep_last_logged,
            "sums": sums,
            "bad_steps": self.bad_steps,
            "rows": self.rows,
            "asked_rows": self.args.per_device_train_batch_size,
            "validated_on": len(self.eval_dataset) if self.stage.validates else 0,
        }
        if isinstance(self.train_dataset, TextStream):
            examples = self.state.global_step * self.get_total_train_batch_size(self.args)
            place["stream"] = self.train_dataset.state_after(examples)
        (partial / PLACE).write_text(json.dumps(place) + "\n")
        if best := self.state.best_global_step:
            # its name alone: a path of this machine would go to the Hub
            self.state.best_model_checkpoint = f"checkpoint-{best}"
        # a fresh control: what was due at this step is not due where a run goes on from it
        for callback in [*self.callback_handler.callbacks, TrainerControl()]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self._point_to_best()

    def _point_to_best(self) -> None:
        """Say where the best checkpoint is, as the end of the training wants it."""
        if best := self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.stage.checkpoints / f"checkpoint-{best}")

    def _is_finite(self) -> bool:
        broken = torch.stack([~p.isfinite().all() for p in self.model.parameters()]).sum()
        return int(self.accelerator.reduce(broken)) == 0

    def _last_good(self) -> str:
        try:
            whole, _ = newest_whole(self.stage.checkpoints)
        except CheckpointError:
            whole = None
        return f"the last good checkpoint is {whole}" if whole else "there is no checkpoint yet"

    def _cannot_save(self, final: Path, problem: str) -> None:
        if self.is_world_process_zero():
            clear(self.stage.checkpoints)
        needed = checkpoint_bytes(self.model, self.optimizer)
        last = self._last_good()
        message = (
            f"{self.stage.name}: cannot save {final}: {problem}\n"
            f"  {shown(free_bytes(final))} are free on its disk, and a checkpoint takes about "
            f"{needed / 1e6:,.0f} MB; {last}"
        )
        if self.stage.on_save_error == "stop" or last.startswith("there"):
            raise CheckpointError(message)
        self.say(f"{message}; going on")

    def take_up(self, checkpoint: Path) -> None:
        """Read what transformers does not keep: sums, a stream's place, a micro-batch that shrank.

        Raises:
            CheckpointError: if the data is not what the checkpoint was trained on.
        """
        then = read_manifest(checkpoint)["data"]
        if then != data_fingerprint(self.train_dataset, then["examples"]):
            raise CheckpointError(
                f"{self.stage.name}: the data has changed since {checkpoint} was written\n"
                "  Give this run another --name, or pass --restart, which moves the old stage aside"
            )
        self.place = json.loads((checkpoint / PLACE).read_text())
        if "stream" in self.place:
            self.train_dataset.resume(self.place["stream"])
            self.random_states = checkpoint
        if self.stage.validates:  # a larger max_steps would allow for more of them
            self.eval_dataset = self.eval_dataset.cut(self.place["validated_on"], self.stage.seed)
        if self.place["rows"] < self.place["asked_rows"]:  # memory ran out
            self.rows = min(self.rows, self.place["rows"])

    def restore_sums(self) -> None:
        """Set the sums back, once the training loop has set them to zero."""
        self._point_to_best()
        if self.place is not None:
            self._globalstep_last_logged = self.place["logged_at"]
            self.bad_steps = self.place["bad_steps"]
            loss, hits, self.hits_of = self.place["sums"][self.args.process_index]
            self._tr_loss.fill_(loss)
            self.hits.fill_(hits)

    # --- the order ---

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        total = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return StepSampler(len(dataset), total, self.args.seed)

    # --- validation ---

    def _hold_out(self, held_out: HeldOut) -> None:
        """Validate on as much of what is held out as `eval_budget` allows."""
        budget, args = self.stage.eval_budget, self.args
        count = documents_within(budget, held_out, self.stage, args, self._run_tokens())
        self.eval_dataset = held_out.cut(count, self.stage.seed)
        if count < len(held_out):
            kind = "rows" if self.stage.name == "base" else "conversations"
            self.say(
                f"{self.stage.name}: each of {evaluations(args)} validations takes {count:,} of "
                f"{len(held_out):,} held-out {kind}: eval_budget is {budget:.0%} of the time"
            )

    def _run_tokens(self) -> int:
        """Tokens of the whole stage, base's and mid's rows taken as full."""
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is not None:
            return sum(lengths)
        examples = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return examples * self.data_collator.max_length

    def validation_is_due(self, step: int) -> bool:
        """Whether a run that goes on from this step left before it was validated there."""
        every, steps = self.args.eval_steps or 0, self.args.max_steps
        every = math.ceil(every * steps) if every < 1 else every
        due = self.stage.validates and every and step % every == 0
        return bool(due) and not self.metrics_log.has_validation(step)

    def is_complete(self) -> bool:
        """Whether every step is done, and the last one validated if any is."""
        steps = self.args.max_steps
        validated = not self.stage.validates or self.metrics_log.has_validation(steps)
        return self.has_every_step() and validated

    def has_every_step(self) -> bool:
        """Whether no step is left to do."""
        return self.state.global_step >= self.args.max_steps

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; a checkpoint that is due is written before, any other if it fails."""
        best = self.args.metric_for_best_model is not None or self.args.save_strategy == "best"
        if self.control.should_save and not best:
            self.save_checkpoint()
            self.control.should_save = False
        try:
            return super()._evaluate(*args, **kwargs)
        except Exception:
            if self.args.world_size == 1:  # else the others are not here to save theirs
                self.save_if_new()
            raise

    def save_if_new(self) -> None:
        """Write a checkpoint of the step that was reached, unless there is one."""
        step = self.state.global_step
        if step and step not in map(step_of, checkpoints(self.stage.checkpoints)):
            self.save_checkpoint()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Answer the sample prompts, then validate."""
        began = time.perf_counter()
        self.metrics_log.began_validation = self.metrics_log.seconds()
        # of sharded weights every token of an answer would gather them all
        if self.is_world_process_zero() and self.stage.sample_prompts and not self._is_sharded():
            self._sample()
        self.metrics_log.sample_seconds = time.perf_counter() - began
        return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """This process's share of the held-out examples, every n-th, laid into rows together."""
        share = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.eval_dataset, share),
            batch_size=EVAL_EXAMPLES,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # it draws a seed: not from the one that dropout uses
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean loss a trained token, the same whatever the batch and the number of processes.

        The stock loop averages over batches, and repeats examples to even the processes out. Beside
        the metrics, each document's loss goes to `validation.jsonl`.
        """
        held_out = self.eval_dataset
        # of each document: loss, predicted tokens, the likeliest among them, loss of its text alone
        totals = torch.zeros((4, len(held_out)), dtype=torch.float64)
        self.model.eval()
        for part in self._eval_parts(dataloader):
            self._add_losses(totals, part)
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
            if self.stop_signal.received and not self._is_sharded():
                break
        if self.stop_signal.is_told():
            raise StepAbandoned  # it is done when the run goes on
        totals = self.accelerator.reduce(totals.to(self.args.device)).cpu()
        losses, tokens = totals[0].tolist(), totals[1].long().tolist()
        self.metrics_log.validation.append(
            {"step": self.state.global_step, "losses": losses, "tokens": tokens}
        )
        self.metrics_log.advice = self._advise()
        text_bytes = None
        if self.stage.name != "sft":
            text_bytes = held_out.text_bytes(self.processing_class)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=validation_metrics(metric_key_prefix, held_out, totals, text_bytes),
            num_samples=len(held_out),
        )

    def _add_losses(self, totals: torch.Tensor, part: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's losses to those of its documents; out of memory, in smaller parts."""
        numbers = part["numbers"][:, 1:][part["labels"][:, 1:] != IGNORED]
        try:
            targets, losses, hits = self._token_losses(part)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or self._is_sharded():
                raise
            targets = None
        if targets is None:
            clear_device_cache(garbage_collection=True)
            smaller = micro_batches(part, len(part["labels"]) // 2)
            if len(smaller) == 1:
                raise self._shortage(part)
            for one in smaller:
                self._add_losses(totals, one)
            return
        special = torch.tensor(self.processing_class.all_special_ids)
        of_text = ~torch.isin(targets, special)
        counted = torch.stack([losses, torch.ones_like(losses), hits.double(), losses * of_text])
        totals.index_add_(1, numbers, counted)

    def _token_losses(self, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The targets of a micro-batch, their losses (float64) and whether each was likeliest."""
        inputs = model_inputs(part)
        targets = inputs["targets"]
        with self.compute_loss_context_manager():
            if self.fused:
                losses, hits = self.model(**self._prepare_inputs(inputs), each=True)
            else:
                step = {name: part[name] for name in ("input_ids", "position_ids")}
                output = self.model(**self._prepare_inputs(step), use_cache=False)
                logits = output.logits.flatten(0, 1)[inputs["target_positions"]].float().cpu()
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                hits = logits.argmax(1) == targets
        return targets, losses.double().cpu(), hits.cpu()

    def _advise(self) -> Advice | None:
        """What the validations so far say of the steps to come."""
        log, step = self.metrics_log, self.state.global_step
        validations = [
            Validation(line["step"], np.array(line["losses"]), np.array(line["tokens"]))
            for line in log.validation.lines
        ]
        train = [(line["step"], line["loss"]) for line in log.lines if "loss" in line]
        aside = sum(log.values("eval_seconds")) + sum(log.values("sample_seconds"))
        seconds = log.began_validation - aside
        constant = self.args.lr_scheduler_type in ("constant", "constant_with_warmup")
        epoch = getattr(self.train_dataset, "epoch", None)
        if epoch is None and not isinstance(self.train_dataset, TextStream):
            epoch = len(self.train_dataset)
        return advise(
            validations,
            train,
            self.args.max_steps,
            epoch and math.ceil(epoch / self.get_total_train_batch_size(self.args)),
            seconds / step if step else None,
            self.args.max_steps if constant else self.decay_start,
        )

    def is_at_plateau(self) -> bool:
        """Whether the recipe stops a stage at a plateau, and the last validation says so."""
        log = self.metrics_log
        advice = next((line["advice"] for line in reversed(log.lines) if "advice" in line), None)
        stops = self.stage.stop == "plateau" and not self.is_complete()
        # one that was given for another end says nothing of this one
        given = advice is not None and advice["max_steps"] == self.args.max_steps
        return stops and given and advice["plateau"]

    @torch.no_grad()
    def _sample(self) -> None:
        """Write down how the model answers the recipe's sample prompts."""
        self.model.eval()
        tokenizer, prompts = self.processing_class, self.stage.sample_prompts
        if self.stage.name == "base":  # it has seen no conversation yet
            texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
        else:
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = [prompt_text(messages, tokenizer) for messages in asked]
        model = self._plain_model()
        with attention_of(model, self.own_attention), self.compute_loss_context_manager():
            answers = greedy_answers(model, tokenizer, texts)
        for prompt, answer in zip(prompts, answers, strict=True):
            step = self.state.global_step
            self.metrics_log.samples.append({"step": step, "prompt": prompt, "answer": answer})

    def _eval_parts(self, dataloader: Any) -> Iterator[dict[str, torch.Tensor]]:
        rows = self.args.per_device_eval_batch_size
        parts = (part for step in dataloader for part in micro_batches(step, rows))
        if not self._is_sharded():
            return parts
        parts = list(parts)
        count = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
        example = self.data_collator([self.eval_dataset[0]])
        idle = example | {"labels": torch.full_like(example["labels"], IGNORED)}
        return iter(parts + [idle] * (int(count.max()) - len(parts)))


class StageTrainer(_StageMixin, Trainer):
    """The trainer of base and mid."""


class SFTStageTrainer(_StageMixin, SFTTrainer):
    """The trainer of sft; its training set holds the examples of the whole run in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave out trl's card at every checkpoint: the finished stage gets its own."""


class StageCallback(TrainerCallback):
    """Goes on with the sums of a log line, and saves before the learning rate decays."""

    def __init__(self, trainer: _StageMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """The training loop has just set them to zero."""
        self.trainer.restore_sums()

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the random states back: transformers leaves them where it skips no data."""
        if self.trainer.random_states is not None:
            self.trainer._load_rng_state(str(self.trainer.random_states))
            self.trainer.random_states = None
        # it was broken off between its last step and its end: transformers would take one more
        if self.trainer.has_every_step() or self.trainer.is_at_plateau():
            raise StepAbandoned

    def on_evaluate(self, args, state, control, **kwargs):
        """Stop at a plateau, if the recipe says so."""
        if self.trainer.is_at_plateau():
            if args.save_strategy != "no":
                self.trainer.save_if_new()
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        """Keep a checkpoint that a longer run can go on from."""
        if state.global_step == self.trainer.decay_start and args.save_strategy != "no":
            control.should_save = True
