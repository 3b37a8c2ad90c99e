"""The step: one optimizer update from packed micro-batches, its loss a mean over trained tokens.

`PackedStep` is the first of three classes that `trainer.py` puts before transformers' and trl's
trainers: the step, saving and resuming (`checkpointing.py`), validating (`validating.py`).
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hfsft.data.order import RunOrder, deal, run_order
from hfsft.data.packing import (
    PackedConversations,
    StepCollator,
    micro_batches,
    model_inputs,
    on_device,
)
from hfsft.data.stream import TextStream
from hfsft.errors import CheckpointError, MemoryShortage, RecipeError, TrainingError
from hfsft.model.activation import square_in_half
from hfsft.model.attention import packed_attention
from hfsft.model.compiling import compile_layers
from hfsft.model.dropout import drop_by_token
from hfsft.model.head import fuse_head
from hfsft.model.loading import plain_model
from hfsft.model.optimizer import own_optimizer
from hfsft.process_group import meet
from hfsft.recipe.schema import Stage
from hfsft.run.manifest import newest_valid
from hfsft.tokens.encoding import IGNORED
from hfsft.train.callbacks import ConsoleCallback, MetricsCallback, StopOnSignal, guard_trackers

BAD_STEPS = "bad_steps.jsonl"  # updates that were skipped, and their examples
FITTING = "`hfsft plan RECIPE` says which max_length, gradient_checkpointing, optim or lora fits"


class StepSampler(torch.utils.data.Sampler):
    """The first `total` items of `run_order`, as indices: the examples of a whole run."""

    def __init__(self, examples: int, total: int, seed: int):
        self.examples, self.total, self.seed = examples, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(run_order(list(range(self.examples)), self.seed), self.total)


class DealtSampler(torch.utils.data.Sampler):
    """A run's examples in order, each step's dealt to the ranks: consecutive ones are a rank's."""

    def __init__(self, lengths: list[int], examples: int, ranks: int):
        """Set up; see `deal`.

        Args:
            lengths: tokens of each example of the run.
            examples: per step.
            ranks: the world size; with one the order is unchanged.
        """
        self.lengths, self.examples, self.ranks = lengths, examples, ranks

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self.lengths), self.examples):
            lengths = self.lengths[start : start + self.examples]
            if self.ranks == 1 or len(lengths) < self.examples:
                yield from range(start, start + len(lengths))
            else:
                yield from (start + i for hand in deal(lengths, self.ranks) for i in hand)


def step_seed(*parts: int) -> int:
    """A seed for a step's random numbers, from the run's seed, the step and perhaps the rank.

    A checkpoint then resumes the same under any number of processes: none has a random state that
    the others lack.
    """
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 2**63


class StepAbandoned(Exception):
    """Training stopped between two updates: a step or validation was abandoned, or none is left."""


class PackedStep:
    """A trainer whose data loader yields whole steps, which `training_step` cuts up."""

    def __init__(self, stage: Stage, examples: int, length: int | None, **kwargs: Any):
        """Set the trainer up.

        Args:
            stage: the recipe's section.
            examples: per optimizer step, over all ranks.
            length: tokens per row; None: those of the step's longest conversation.
            kwargs: of the `Trainer`; `args.per_device_train_batch_size` is a micro-batch's rows.

        Raises:
            RecipeError: if upstream refuses the settings, or the step does not divide.
        """
        meet("loads its data and model", stage.quiet)  # no collective yet: they have a time-out
        args = kwargs["args"]
        _fit_arguments(args, stage, examples, kwargs["train_dataset"], kwargs["model"])
        collator = StepCollator(kwargs["processing_class"].pad_token_id, length)
        try:
            own = own_optimizer(stage, args)
            super().__init__(data_collator=collator, optimizer_cls_and_kwargs=own, **kwargs)
        except (ValueError, ImportError, RuntimeError) as error:
            raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # no second copy of them
        if stage.load_in_4bit:
            _adapter_in_float32(self.model)
        self.stage = stage
        self._train_batch_size = examples // args.world_size  # the data loader yields whole steps
        self.rows = args.per_device_train_batch_size  # of a micro-batch; 0: one document each
        self.correct = torch.zeros((), device=args.device)  # top-1 predictions since the last log
        self.predicted = 0  # trained tokens since the last log
        self.bad_steps = 0  # in a row
        self.grad_norm: Any = None  # of the step, after clipping
        self.compiled = bool(stage.trainer.get("torch_compile"))
        self._choose_implementation()
        # a graph cannot draw masks
        self.masks = None if self.compiled else drop_by_token(self.model)
        if self.compiled:
            compile_layers(plain_model(self.model))
        self._add_own_callbacks()

    def _add_own_callbacks(self) -> None:
        stage = self.stage
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(stage.folder / "tensorboard")
        guard_trackers(self.callback_handler, self.say)
        self.stop_signal = StopOnSignal(self.accelerator)
        self.metrics_log = MetricsCallback(stage.folder, self.is_world_process_zero())
        self.console = ConsoleCallback(stage.name, self.metrics_log)
        for callback in (self.stop_signal, self.metrics_log, SkipBadUpdates(self)):
            self.add_callback(callback)

    def say(self, text: str) -> None:
        """Print a line on the main process, unless the stage is quiet."""
        if not self.stage.quiet and self.is_world_process_zero():
            self.console.say(text)

    def is_sharded(self) -> bool:
        """Whether weights are sharded over ranks, so that every forward gathers them."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # --- which attention and which loss ---

    def _choose_implementation(self) -> None:
        """Use the fastest attention and loss that reproduce the model's own loss on a sample."""
        model = plain_model(self.model)
        square_in_half(model)
        self.own_attention = own = model.config._attn_implementation
        self.half = self.args.bf16 or self.args.fp16 or model.dtype != torch.float32
        longest = self.data_collator.max_length
        fast = packed_attention(model, self.args.device, self.half, longest, self.compiled)
        # trl's own loss, which router losses and label smoothing need
        self.stock = self.label_smoother is not None or getattr(self, "aux_loss_enabled", False)
        dft = getattr(self.args, "loss_type", "nll") == "dft"
        self.fused = not self.stock and fuse_head(model, dft)
        if dft and not self.stock and not self.fused:
            raise RecipeError(f"{self.stage.name}.loss_type: dft needs a model with a linear head")
        if self.is_sharded():  # the weights are not all on this rank, so nothing can be tried
            model.set_attn_implementation(fast)
            return
        documents = [list(range(1, 8)), list(range(8, 13)), list(range(13, 16))]
        if dft and self.fused:
            expected = sum(_dft_loss(model, ids, self.args.device) for ids in documents)
        else:
            expected = sum(self._sample_loss(model, [ids], fused=False) for ids in documents)
        candidates = [(fast, True), (own, True)] if self.fused else []
        if not (dft and self.fused):  # the model's own loss is another one
            candidates.append((own, False))
        for attention, fused in candidates:
            model.set_attn_implementation(attention)
            try:
                error = abs(self._sample_loss(model, documents, fused) / expected - 1)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):  # a kernel that refuses the shape of this model
                continue
            if error < (2e-2 if self.half else 1e-4):
                self.fused = fused
                return
        if dft and self.fused:
            raise RecipeError(
                f"{self.stage.name}.loss_type: dft does not reproduce this model's loss on a sample"
            )
        self.fused, self.data_collator.alone = False, True

    @torch.no_grad()
    def _sample_loss(self, model: Any, documents: list[list[int]], fused: bool) -> float:
        """The summed loss of documents that are packed into one row."""
        model.eval()
        examples = [{"input_ids": ids, "labels": ids} for ids in documents]
        step = StepCollator(0, sum(map(len, documents)))(examples)
        inputs = on_device(model_inputs(step) if fused else step, self.args.device)
        with self.accelerator.autocast():  # Accelerate wraps the model in it only later
            if fused:
                return model(**inputs)[0].item()
            loss = model(**inputs, use_cache=False).loss
            return loss.item() * (inputs["labels"] != IGNORED).sum().item()

    # --- a step ---

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Whole steps, kept on the CPU, where `training_step` cuts them without synchronising."""
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        total = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return StepSampler(len(dataset), total, self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Trained tokens of the step, summed over ranks."""
        tokens = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        return self.accelerator.reduce(tokens.to(device))

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        """Forward and backward of a full step; on out-of-memory, retry with smaller micro-batches.

        Args:
            model: as Accelerate wraps it.
            inputs: as `StepCollator` makes them.
            num_items_in_batch: trained tokens of the step, summed over ranks.

        Returns:
            This rank's share of the mean loss per trained token, times the world size.

        Raises:
            MemoryShortage: if a single document does not fit.
        """
        seed, step = self.args.seed, self.state.global_step
        torch.manual_seed(step_seed(seed, step, self.args.process_index))
        if self.masks is not None:
            self.masks.begin_step(step_seed(seed, step))
        cuda = torch.cuda.is_available()
        random_state = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
        counted = self.correct.clone(), self.predicted
        while (loss := self._accumulate(model, inputs, num_items_in_batch)) is None:
            model.zero_grad()
            self.correct, self.predicted = counted[0].clone(), counted[1]
            torch.set_rng_state(random_state[0])
            if cuda:
                torch.cuda.set_rng_state(random_state[1])
            if self.stop_signal.impatient:
                raise StepAbandoned
            self._shrink_micro_batches(inputs)
        self.step_loss = loss
        return loss

    def _accumulate(
        self, model: Any, step: dict[str, torch.Tensor], num_items: torch.Tensor
    ) -> torch.Tensor | None:
        """Accumulate the gradient micro-batch by micro-batch; returns the loss.

        None: memory ran out, or a second signal asked to abandon the step.
        """
        parts = micro_batches(step, self.rows)
        if self.is_sharded():  # every forward is a collective: all ranks make as many
            parts = self._padded_to_most(parts, parts[0])
        total = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            # gradients are reduced over ranks with the last one; DeepSpeed counts for itself
            last = index == len(parts) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            synchronised = last or self.is_deepspeed_enabled
            if self.stop_signal.impatient:
                return None
            try:
                with nullcontext() if synchronised else self.accelerator.no_sync(model):
                    if self.masks is not None:
                        self.masks.begin_micro_batch(part, self.args.device)
                    inputs = model_inputs(part) if self.fused else part
                    inputs = on_device(inputs, self.args.device)
                    total += super().training_step(model, inputs, num_items)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.args.world_size > 1 and (synchronised or self.is_sharded()):
                    raise self.memory_shortage(step) from None  # peers wait in a collective
                return None
        return total

    def _padded_to_most(
        self, parts: list[dict[str, torch.Tensor]], example: dict[str, torch.Tensor]
    ) -> list[dict[str, torch.Tensor]]:
        """As many micro-batches as the rank that has most; those added train on no token."""
        count = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
        idle = example | {"labels": torch.full_like(example["labels"], IGNORED)}
        return [idle] * (int(count.max()) - len(parts)) + parts

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The loss of a micro-batch, as its share of the step's mean."""
        if "targets" not in inputs:
            if self.stock:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        total, correct = model(**inputs)
        self.correct += correct
        self.predicted += len(inputs["targets"])
        # DDP and FSDP average the gradients of the ranks
        return total / num_items_in_batch * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the top-1 accuracy over the trained tokens since the last line."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself, and NaN stays NaN
        if "loss" in logs and self.fused:
            predicted = torch.tensor(float(self.predicted), device=self.args.device)
            sums = self.accelerator.reduce(torch.stack([self.correct, predicted])).tolist()
            logs["mean_token_accuracy"] = sums[0] / max(sums[1], 1)
            self.correct, self.predicted = torch.zeros_like(self.correct), 0
        super().log(logs, start_time)

    # --- out of memory ---

    def _shrink_micro_batches(self, step: dict[str, torch.Tensor]) -> None:
        if self.rows == 0:
            raise self.memory_shortage(step)
        self.rows = min(self.rows, len(step["input_ids"])) // 2
        clear_device_cache(garbage_collection=True)
        size = {0: "one document", 1: "1 row"}.get(self.rows, f"{self.rows} rows")
        self.say(
            f"{self.stage.name}: out of memory; repeating the step with micro-batches of {size}, "
            "which leaves its result unchanged"
        )

    def memory_shortage(self, step: dict[str, torch.Tensor]) -> MemoryShortage:
        """The error of a step that does not fit, however it is cut up."""
        longest = max(part["input_ids"].shape[1] for part in micro_batches(step, 0))
        limit = f" within memory_limit: {self.stage.memory_limit}" * bool(self.stage.memory_limit)
        return MemoryShortage(
            f"{self.stage.name}: out of memory{limit} with {longest:,} tokens in "
            f"{'a micro-batch' if self.rows else 'one document'} on {self.args.device}\n  {FITTING}"
        )

    # --- losses and gradients that are not finite ---

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Keep the norm for `skip_bad_update`: callbacks do not receive it."""
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    def skip_bad_update(self) -> None:
        """Drop the gradients where loss or norm is not finite, so that the update changes nothing.

        Raises:
            TrainingError: after `max_bad_steps` such steps in a row.
        """
        loss = self.accelerator.reduce(self.step_loss)
        # under fp16 norms overflow as expected: the gradient scaler skips those updates itself
        checked = loss if self.args.fp16 else loss + self.grad_norm
        if math.isfinite(checked):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.optimizer.zero_grad()
        if self.is_world_process_zero():
            self._record_bad_step(loss.item(), float(self.grad_norm))
        if self.bad_steps == self.stage.max_bad_steps:
            stage, step = self.stage, self.state.global_step + 1
            raise TrainingError(
                f"{stage.name}: loss or gradient not finite in {self.bad_steps} steps in a row, "
                f"up to step {step}; {last_good_checkpoint(stage)}\n  Their examples are in "
                f"{stage.folder / BAD_STEPS}; a lower learning_rate or max_grad_norm may help"
            )

    def _record_bad_step(self, loss: float, grad_norm: float) -> None:
        step, examples = self.state.global_step, self.get_total_train_batch_size(self.args)
        line = {"step": step + 1, "loss": loss, "grad_norm": grad_norm}
        if not isinstance(self.train_dataset, TextStream):
            order = itertools.islice(self._get_train_sampler(), step * examples, None)
            line |= _origins(self.train_dataset, list(itertools.islice(order, examples)))
        with (self.stage.folder / BAD_STEPS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say(
            f"{self.stage.name} step {step + 1}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: "
            "update skipped"
        )


class SkipBadUpdates(TrainerCallback):
    """Calls `skip_bad_update` between clipping and the optimizer's step."""

    def __init__(self, trainer: PackedStep):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Check the step's loss and gradient."""
        self.trainer.skip_bad_update()


def _fit_arguments(args: Any, stage: Stage, examples: int, dataset: Any, model: Any) -> None:
    """Fit a trainer's arguments to the step, the data and the model, in place."""
    if examples % args.world_size:
        raise RecipeError(
            f"{stage.name}: {examples} examples per step are not divisible by "
            f"{args.world_size} devices"
        )
    if isinstance(dataset, TextStream):
        # it reads ahead in a thread of its own, and must know its position for a checkpoint
        args.dataloader_num_workers = 0
        args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False
    if args.ddp_find_unused_parameters is None and not _has_experts(model):
        args.ddp_find_unused_parameters = False  # transformers' default walks the graph


def _adapter_in_float32(model: Any) -> None:
    """Undo trl's cast of a quantized model's adapter to bfloat16.

    Its updates would be rounded to 8 bits, and fp16's gradient scaler unscales float32 only.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def _has_experts(model: Any) -> bool:
    """Whether a micro-batch may leave weights without a gradient: those of experts."""
    return any("expert" in name for name, _ in model.named_parameters())


def _origins(dataset: Any, examples: list[int]) -> dict[str, list[Any]]:
    """Source and row of a step's examples; of packed base text, the rows' indices."""
    if isinstance(dataset, RunOrder):
        return {"examples": [dataset.origins[example] for example in examples]}
    if isinstance(dataset, PackedConversations):
        items = [item for row in examples for item in dataset.rows[row]]
        return {"examples": [dataset.origins[item] for item in items]}
    return {"rows": examples}


def last_good_checkpoint(stage: Stage) -> str:
    """The end of an error message: which checkpoint the stage can resume from."""
    try:
        newest, _ = newest_valid(stage.checkpoints)
    except CheckpointError:
        newest = None
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


@torch.no_grad()
def _dft_loss(model: Any, ids: list[int], device: torch.device) -> float:
    """The summed loss of a document under `loss_type: dft`, from materialised logits.

    Dynamic fine-tuning weights each token's loss by its probability (Wu et al. 2025).
    """
    model.eval()
    inputs = torch.tensor([ids], device=device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="none")
    return (losses * (-losses).exp()).sum().item()
