"""Validating: the held-out loss within its budget, advice on more steps, sample answers.

`ValidatingStep` is the last of the three classes behind the trainers, see `step.py`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from hfsft.data.packing import micro_batches, model_inputs, on_device
from hfsft.data.stream import TextStream
from hfsft.model.loading import plain_model
from hfsft.plan.sizes import steps_of
from hfsft.process_group import meet
from hfsft.recipe.schema import Stage
from hfsft.tokens.encoding import IGNORED, document_start
from hfsft.tokens.foreign_templates import encode_prompt, special_tokens
from hfsft.train.advice import Advice, Validation, advise
from hfsft.train.checkpointing import ResumableStep
from hfsft.train.held_out import (
    HeldOut,
    attention_of,
    documents_within,
    evaluations,
    greedy_answers,
    losses_of,
    validation_metrics,
)
from hfsft.train.step import StepAbandoned

EVAL_EXAMPLES = 64  # held-out examples that are packed together


class ValidatingStep(ResumableStep):
    """A trainer that validates over tokens, not batches, and stops early if the recipe says so."""

    def __init__(
        self,
        stage: Stage,
        examples: int,
        length: int | None,
        general: Any = None,
        **kwargs: Any,
    ):
        """Set the trainer up; arguments as `PackedStep`, and what `load_general` returns."""
        super().__init__(stage, examples, length, **kwargs)
        self.general: HeldOut | None = None
        if stage.validates and self.eval_dataset is not None:
            unit = "rows" if stage.name == "base" else "conversations"
            share = 1.0 if general is None else 0.5
            self.eval_dataset = self._within_budget(HeldOut(self.eval_dataset), share, unit)
            if general is not None:
                unit = "general conversations and passages"
                self.general = self._within_budget(HeldOut(general), share, unit)
        self.add_callback(StopAtPlateau(self))
        if not stage.quiet:
            self.add_callback(self.console)  # the last: it prints what the others have computed

    # --- what is validated, and when ---

    def _within_budget(self, held_out: HeldOut, share: float, unit: str) -> HeldOut:
        """As much of a held-out set as a share of `eval_budget` allows."""
        budget, args = self.stage.eval_budget, self.args
        allowed = budget if budget >= 1 else share * budget
        count = documents_within(allowed, held_out, self.stage, args, self._training_tokens())
        if count < len(held_out):
            self.say(
                f"{self.stage.name}: each of {evaluations(args)} validations takes {count:,} of "
                f"{len(held_out):,} held-out {unit}: eval_budget is {budget:.0%} of the time"
            )
        return held_out.sample(count, self.stage.seed)

    def _training_tokens(self) -> int:
        """Tokens of the whole stage; the rows of base and mid count as full."""
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is not None:
            return sum(lengths)
        examples = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return examples * self.data_collator.max_length

    def prepare_resume(self, checkpoint: Any) -> None:
        """Validate on as many documents as before: a larger `max_steps` would allow more."""
        super().prepare_resume(checkpoint)
        if self.stage.validates:
            count = self.resumed_from["validated_on"]
            self.eval_dataset = self.eval_dataset.sample(count, self.stage.seed)
            if self.general is not None:
                count = self.resumed_from["general_on"]
                self.general = self.general.sample(count, self.stage.seed)

    def _resume_state(self, sums: list[tuple[float, float, int]]) -> dict[str, Any]:
        """The same as before, and how many general documents are validated on."""
        state = super()._resume_state(sums)
        return state if self.general is None else state | {"general_on": len(self.general)}

    def validation_is_due(self, step: int) -> bool:
        """Whether a run was interrupted at this step before its validation was logged."""
        every = steps_of(self.args.eval_steps or 0, self.args.max_steps)
        due = self.stage.validates and every and step % every == 0
        return bool(due) and not self.metrics_log.has_validation(step)

    def is_complete(self) -> bool:
        """Whether every step is trained, and the last one validated if the stage validates."""
        steps = self.args.max_steps
        validated = not self.stage.validates or self.metrics_log.has_validation(steps)
        return self.has_every_step() and validated

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, after a checkpoint that is due; on one rank a failure saves one too."""
        best = self.args.metric_for_best_model is not None or self.args.save_strategy == "best"
        if self.control.should_save and not best:
            self.save_checkpoint()
            self.control.should_save = False
        try:
            return super()._evaluate(*args, **kwargs)
        except Exception:
            if self.args.world_size == 1:  # saving is a collective, and the peers are elsewhere
                self.save_if_new()
            raise

    # --- the held-out loss ---

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Answer the sample prompts, then compute the held-out loss."""
        began = time.perf_counter()
        self.metrics_log.began_validation = self.metrics_log.seconds()
        # without a gradient or token by token, layers would be compiled up to the limit of eight
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            # with sharded weights every generated token would gather them all
            if self.is_world_process_zero() and self.stage.sample_prompts and not self.is_sharded():
                self._answer_samples()
            meet("answers the sample prompts", self.stage.quiet)
            self.metrics_log.sample_seconds = time.perf_counter() - began
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """This rank's share of the held-out examples, every n-th of them, packed."""
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        share = range(self.args.process_index, len(held_out), self.args.world_size)
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(held_out, share),
            batch_size=EVAL_EXAMPLES,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # it draws a seed, which must not come from dropout's
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean loss per trained token, whatever the batch and the world size.

        The stock loop averages over batches, and repeats examples to give every rank as many. The
        loss of each document goes to `validation.jsonl`.
        """
        held_out = self.eval_dataset
        totals = self._document_losses(dataloader, len(held_out))
        line = {"step": self.state.global_step, **losses_of(totals), "documents": held_out.digest}
        if self.general is not None:
            line["general"] = self._general_losses(self.general)
        self.metrics_log.validation.append(line)
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

    def _general_losses(self, general: HeldOut) -> dict[str, dict[str, list[float]]]:
        """The losses of the general conversations and of the general text."""
        totals = self._document_losses(self.get_eval_dataloader(general), len(general))
        return {name: losses_of(totals[:, own]) for name, own in general.by_source().items()}

    def _document_losses(self, dataloader: Any, documents: int) -> torch.Tensor:
        """Over all ranks, float64 [4, documents]: the totals that `validation_metrics` takes."""
        totals = torch.zeros((4, documents), dtype=torch.float64)
        self.model.eval()
        for part in self._eval_parts(dataloader):
            self._add_losses(totals, part)
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
            if self.stop_signal.received and not self.is_sharded():
                break
        if self.stop_signal.any_rank_signalled():
            raise StepAbandoned  # validation is redone when the run resumes
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals.to(self.args.device)).cpu()
        return totals

    def _eval_parts(self, dataloader: Any) -> Iterator[dict[str, torch.Tensor]]:
        rows = self.args.per_device_eval_batch_size
        parts = (part for step in dataloader for part in micro_batches(step, rows))
        if not self.is_sharded():
            return parts
        return iter(self._padded_to_most(list(parts), self.data_collator([self.eval_dataset[0]])))

    def _add_losses(self, totals: torch.Tensor, part: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's losses to those of its documents; out of memory, in smaller parts."""
        documents = part["numbers"][:, 1:][part["labels"][:, 1:] != IGNORED]
        try:
            targets, losses, correct = self._token_losses(part)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or self.is_sharded():
                raise
            targets = None
        if targets is None:
            clear_device_cache(garbage_collection=True)
            smaller = micro_batches(part, len(part["labels"]) // 2)
            if len(smaller) == 1:
                raise self.memory_shortage(part)
            for one in smaller:
                self._add_losses(totals, one)
            return
        is_text = ~torch.isin(targets, self._special_ids)
        counted = torch.stack([losses, torch.ones_like(losses), correct.double(), losses * is_text])
        totals.index_add_(1, documents, counted)

    @cached_property
    def _special_ids(self) -> torch.Tensor:
        tokenizer = self.processing_class
        return torch.tensor(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))

    def _token_losses(self, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The targets of a micro-batch, their losses (float64), and whether each is the top-1."""
        inputs = model_inputs(part)
        targets = inputs["targets"]
        with self.compute_loss_context_manager():
            if self.fused:
                losses, correct = self.model(**on_device(inputs, self.args.device), each=True)
            else:
                step = {name: part[name] for name in ("input_ids", "position_ids")}
                output = self.model(**on_device(step, self.args.device), use_cache=False)
                logits = output.logits.flatten(0, 1)[inputs["target_positions"]].float().cpu()
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                correct = logits.argmax(1) == targets
        return targets, losses.cpu().double(), correct.cpu()  # MPS has no float64

    # --- advice on training longer ---

    def _advise(self) -> Advice | None:
        log, step = self.metrics_log, self.state.global_step
        validations = [
            Validation(line["step"], np.array(line["losses"]), np.array(line["tokens"]))
            for line in log.validation.lines
        ]
        train = [(line["step"], line["loss"]) for line in log.lines if "loss" in line]
        validating = sum(log.values("eval_seconds")) + sum(log.values("sample_seconds"))
        seconds = log.began_validation - validating
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
        """Whether the recipe stops the stage at a plateau, and the last validation shows one."""
        log = self.metrics_log
        advice = next((line["advice"] for line in reversed(log.lines) if "advice" in line), None)
        stops = self.stage.stop == "plateau" and not self.is_complete()
        # advice given for another max_steps does not count
        given = advice is not None and advice["max_steps"] == self.args.max_steps
        return stops and given and advice["plateau"]

    @torch.no_grad()
    def _answer_samples(self) -> None:
        """Log the model's greedy answers to the recipe's sample prompts."""
        self.model.eval()
        tokenizer, prompts = self.processing_class, self.stage.sample_prompts
        if self.stage.name == "base":  # it has seen no conversation yet
            start = [document_start(tokenizer)]
            texts = tokenizer(prompts, add_special_tokens=False, split_special_tokens=True)
            asked = [start + ids for ids in texts["input_ids"]]
        else:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            asked = [encode_prompt(one, tokenizer) for one in messages]
        model = plain_model(self.model)
        with attention_of(model, self.own_attention), self.compute_loss_context_manager():
            answers = greedy_answers(model, tokenizer, asked)
        for prompt, answer in zip(prompts, answers, strict=True):
            step = self.state.global_step
            self.metrics_log.samples.append({"step": step, "prompt": prompt, "answer": answer})


class StopAtPlateau(TrainerCallback):
    """Ends the stage at a plateau, if the recipe says `stop: plateau`."""

    def __init__(self, trainer: ValidatingStep):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        """Take no step if the run was interrupted after a validation that showed a plateau."""
        if self.trainer.is_at_plateau():
            raise StepAbandoned

    def on_evaluate(self, args, state, control, **kwargs):
        """Save, and stop."""
        if self.trainer.is_at_plateau():
            if args.save_strategy != "no":
                self.trainer.save_if_new()
            control.should_training_stop = True
