"""The trainers: transformers' and trl's, with hfsft's step, order of examples and validation."""

import random
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from hfsft.attention import packed_attention
from hfsft.callbacks import ConsoleCallback, MetricsCallback, StopOnSignal, StreamCallback
from hfsft.conversations import IGNORED
from hfsft.corpus import TextStream
from hfsft.errors import MemoryShortage, RecipeError
from hfsft.head import fuse_head
from hfsft.packing import StepCollator, micro_batches, model_inputs
from hfsft.recipe import Stage

EVAL_EXAMPLES = 64  # held-out examples that are laid into rows together


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
            args.dataloader_num_workers = 0  # it reads ahead by itself, and must know its place
        collator = StepCollator(kwargs["processing_class"].pad_token_id, length)
        try:
            super().__init__(data_collator=collator, **kwargs)
        except (ValueError, ImportError, RuntimeError) as error:
            raise RecipeError(f"{stage.name}: {' '.join(str(error).split())}") from None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.stage = stage
        self._train_batch_size = examples // args.world_size  # the data loader yields whole steps
        self.rows = args.per_device_train_batch_size  # of a micro-batch; 0: one document each
        self.hits = torch.zeros((), device=args.device)  # tokens that were the likeliest one
        self.hits_of = 0  # trained tokens, since the last log line
        self._choose_step()
        self.stop_signal = StopOnSignal(self.accelerator)
        self.metrics_log = MetricsCallback(stage.folder / "metrics.jsonl")
        self.console = ConsoleCallback(stage.name)
        self.add_callback(self.stop_signal)
        if isinstance(self.train_dataset, TextStream):
            self.add_callback(StreamCallback(self.train_dataset))
        self.add_callback(self.metrics_log)
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
        before = torch.get_rng_state(), _cuda_random_state(), self.hits.clone(), self.hits_of
        while (loss := self._micro_steps(model, inputs, num_items_in_batch)) is None:
            self._shrink(inputs)
            model.zero_grad()
            random_state, cuda_random_state, self.hits, self.hits_of = before
            torch.set_rng_state(random_state)
            if cuda_random_state is not None:
                torch.cuda.set_rng_state(cuda_random_state)
        return loss

    def _micro_steps(
        self, model: Any, step: dict[str, torch.Tensor], num_items: torch.Tensor
    ) -> torch.Tensor | None:
        """The step in micro-batches of `self.rows` rows; None where memory did not suffice."""
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
        if not self.stage.quiet and self.is_world_process_zero():
            self.console.say(
                f"{self.stage.name}: out of memory; the step is done again, and from here on, with "
                f"{size} a micro-batch, which leaves its result as it is"
            )

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
            loss_of = super().compute_loss if self.stock else partial(Trainer.compute_loss, self)
            return loss_of(model, inputs, return_outputs, num_items_in_batch)
        total, hits = model(**inputs)
        self.hits += hits
        self.hits_of += len(inputs["targets"])
        # DDP and FSDP average the gradients of the processes
        return total / num_items_in_batch * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the share of trained tokens that were the model's likeliest one."""
        if "loss" in logs and self.fused:
            of = torch.tensor(float(self.hits_of), device=self.args.device)
            hits, of = self.accelerator.reduce(torch.stack([self.hits, of])).tolist()
            logs["mean_token_accuracy"] = hits / max(of, 1)
            self.hits, self.hits_of = torch.zeros_like(self.hits), 0
        super().log(logs, start_time)

    # --- the order ---

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        total = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return StepSampler(len(dataset), total, self.args.seed)

    # --- validation ---

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """This process's share of the held-out examples, every n-th, laid into rows together."""
        share = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.eval_dataset, share),
            batch_size=EVAL_EXAMPLES,
            collate_fn=self.data_collator,
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean loss a trained token, the same whatever the batch and the number of processes.

        The stock loop averages over batches, and repeats examples to even the processes out.
        """
        args = self.args
        totals = torch.zeros(3, dtype=torch.float64, device=args.device)  # loss, hits, tokens
        self.model.eval()
        for part in self._eval_parts(dataloader):
            tokens = (part["labels"] != IGNORED).sum()
            inputs = self._prepare_inputs(model_inputs(part) if self.fused else part)
            with self.compute_loss_context_manager():
                if self.fused:
                    loss, hits = self.model(**inputs)
                else:
                    loss = self.compute_loss(self.model, inputs) * tokens
                    hits = torch.zeros_like(loss)
            totals += torch.stack([loss.double(), hits.double(), tokens.to(loss).double()])
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        loss, hits, tokens = self.accelerator.reduce(totals).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / max(tokens, 1)}
        if self.fused:
            metrics[f"{metric_key_prefix}_mean_token_accuracy"] = hits / max(tokens, 1)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(self.eval_dataset),
        )

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
    """The trainer of sft."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave out trl's card at every checkpoint: the finished stage gets its own."""


def _cuda_random_state() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None
