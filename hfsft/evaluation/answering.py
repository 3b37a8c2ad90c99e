"""A model that answers prompts: loading, greedy generation with a calculator, choices, losses."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from hfsft.errors import DataError, MemoryShortage, ModelError, first_line
from hfsft.evaluation.calculator import calculate
from hfsft.hub.client import NOT_LOADED, require_model
from hfsft.model.head import fuse_head
from hfsft.model.loading import bf16_is_native, load_plain_model
from hfsft.recipe.schema import Stage
from hfsft.run.record import read_record
from hfsft.tokens.encoding import IGNORED
from hfsft.tokens.foreign_templates import encode_prompt, special_tokens
from hfsft.tokens.tokenizer import require_bounded

# these delimit a calculator call and its result, as in karpathy/nanochat
TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


NANOCHAT_BOS = "<|bos|>"  # starts every training document of a nanochat model


def load_for_answers(model: str, exact: bool = False) -> Any:
    """Load a model for inference: in bfloat16 on a GPU that supports it natively, else float32.

    Args:
        model: a folder or a Hub id.
        exact: in float32 on the CPU, whatever there is.

    Raises:
        ModelError: if it cannot be loaded.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bare = Stage(name="", folder=Path(), seed=0, data=[], held_out=0)
    dtype = "float32" if exact else answer_dtype()
    loaded = load_plain_model(model, bare, dtype=dtype).eval()
    return loaded.to("cuda") if torch.cuda.is_available() and not exact else loaded


def answer_dtype() -> str:
    """The dtype that models are loaded in on this machine."""
    on_gpu = torch.cuda.is_available() and bf16_is_native()
    return "bfloat16" if on_gpu else "float32"


def load_its_tokenizer(model: str) -> Any:
    """Load a model's tokenizer unchanged, with left padding; its pad token defaults to its EOS.

    Raises:
        ModelError: if it cannot be loaded.
    """
    require_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, padding_side="left", trust_remote_code=False
        )
    except Exception as error:
        # the tokenizers library raises Exception itself
        if type(error) is not Exception and not isinstance(error, NOT_LOADED):
            raise
        raise ModelError(f"{model}: cannot load its tokenizer: {first_line(error)}") from None
    require_bounded(tokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{model}: its tokenizer has neither a pad nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
    return tokenizer


def has_calculator(tokenizer: Any) -> bool:
    """Whether a model can ask for a calculation: its tokenizer has `TOOL_TOKENS`."""
    return set(TOOL_TOKENS) <= set(tokenizer.get_vocab())


class Calculator(LogitsProcessor):
    """Forces the calculator's result after each call, row by row, during batched generation."""

    def __init__(self, tokenizer: Any, start: int):
        """Set it up for one call of `generate`.

        Args:
            tokenizer: has `TOOL_TOKENS`.
            start: length of the padded prompts, in which calls are ignored.
        """
        self.tokenizer, self.start = tokenizer, start
        ids = tokenizer.convert_tokens_to_ids(list(TOOL_TOKENS))
        self.call, self.end, self.output, self.output_end = ids
        self.forced: dict[int, list[int]] = {}  # row → tokens still to be forced

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask all but the next token of a pending result; scores [rows, vocabulary]."""
        for row in (input_ids[:, -1] == self.end).nonzero().flatten().tolist():
            self.forced.setdefault(row, self.result(input_ids[row, self.start :].tolist()))
        for row, tokens in list(self.forced.items()):
            if not tokens:
                del self.forced[row]
                continue
            scores[row] = -torch.inf
            scores[row, tokens.pop(0)] = 0.0
        return scores

    def result(self, generated: list[int]) -> list[int]:
        """The tokens to force after a call that just ended; none if it cannot be evaluated."""
        starts = [index for index, token in enumerate(generated) if token == self.call]
        if not starts:
            return []
        # special tokens are decoded too, so a call with a stray end token is not evaluated
        result = calculate(self.tokenizer.decode(generated[starts[-1] + 1 : -1]))
        if result is None:
            return []
        digits = self.tokenizer(result, add_special_tokens=False)["input_ids"]
        return [self.output, *digits, self.output_end]


def generate_greedily(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    pad_token_id: int,
    eos_token_id: int | list[int] | None,
    processors: Sequence[LogitsProcessor] = (),
    tokenizer: Any = None,
    **settings: Any,
) -> Any:
    """Call `model.generate` with top-1 decoding; no random number is drawn.

    Args:
        model: a causal language model in evaluation mode.
        inputs: `input_ids` and `attention_mask`, [prompts, tokens], padded on the left.
        pad_token_id: fills rows that end early.
        eos_token_id: tokens that end an answer.
        processors: adjust the logits before each token is chosen.
        tokenizer: needed for `stop_strings` only.
        settings: further ones of `GenerationConfig`, such as `max_new_tokens`.

    Returns:
        What `generate` returns: token ids [prompts, tokens] with the prompts in front, or an
        object if the settings say so.
    """
    # `generate` fills in what is not set here from the model's own, which may penalize repetition
    own, model.generation_config = model.generation_config, GenerationConfig()
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        **settings,
    )
    try:
        return model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            tokenizer=tokenizer,
        )
    finally:
        model.generation_config = own


class Evaluator:
    """A model that answers batches of prompts with top-1 decoding.

    A model with a chat template is prompted as a chat. Others, and hfsft's base stage, whose chat
    tokens are still untrained, are prompted with `Question: ... Answer:`.
    """

    def __init__(self, folder: str, batch_size: int = 50):
        """Load the tokenizer; the weights are loaded on first use.

        Args:
            folder: a model's, or a Hub id.
            batch_size: prompts per batch.

        Raises:
            ModelError: if the tokenizer or configuration cannot be loaded.
        """
        self.tokenizer = load_its_tokenizer(folder)
        self.folder, self.batch_size = folder, batch_size
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except NOT_LOADED as error:
            raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from None
        record = read_record(Path(folder))
        is_base = record is not None and record["stage"] == "base"
        self.is_chat = bool(self.tokenizer.chat_template) and not is_base
        # the length of its context, if the configuration states it
        self.positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.has_calculator = has_calculator(self.tokenizer)

    @cached_property
    def model(self) -> Any:
        """The weights."""
        return load_for_answers(self.folder)

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer."""
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        ids = {self.tokenizer.eos_token_id, *configured} - {None}
        if self.tokenizer.bos_token == NANOCHAT_BOS:
            ids.add(self.tokenizer.bos_token_id)  # as in nanochat's engine
        return sorted(ids)

    # --- prompts ---

    def prompt_ids(
        self,
        prompt: str,
        plain: str | None = None,
        answer: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """A prompt as token ids, encoded as in training: special tokens inside it are plain text.

        Args:
            prompt: the user's message.
            plain: the prompt of a model that is not a chat model, instead of
                `Question: ... Answer:`.
            answer: appended as the model would write it.
            tools: that the model may call, in OpenAI's form; for a chat model only.

        Raises:
            ModelError: if the model has no chat template that can write the tools.
        """
        if self.is_chat:
            messages = [{"role": "user", "content": prompt}]
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            return encode_prompt(messages, self.tokenizer, list(tools))
        if tools:
            raise ModelError(f"{self.folder}: is not a chat model, so it cannot be given tools")
        text = f"Question: {prompt}\nAnswer:" if plain is None else plain
        text = text if answer is None else f"{text} {answer}"
        ids = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        bos = self.tokenizer.bos_token_id
        is_missing = self.tokenizer.bos_token == NANOCHAT_BOS and ids[:1] != [bos]
        return [bos, *ids] if is_missing else ids

    def answer_budget(self, prompts: list[list[int]], max_new_tokens: int) -> int:
        """How many of `max_new_tokens` fit into the model's context after each of the prompts.

        At least half of the context, or `max_new_tokens` if that is less: see `fitted`.
        """
        if self.positions is None:
            return max_new_tokens
        longest = max(map(len, prompts), default=0)
        return min(max_new_tokens, max(self.positions - longest, self.positions // 2))

    def fitted(self, ids: list[int], budget: int) -> list[int]:
        """A prompt with its middle cut out where it leaves fewer than `budget` positions.

        Its beginning, with the BOS token, the user's mark and any system message, and its end,
        with the assistant's mark, stay.
        """
        room = len(ids) if self.positions is None else self.positions - budget
        if len(ids) <= room:
            return ids
        return ids[: room // 2] + ids[len(ids) - (room - room // 2) :]

    def _inputs(self, prompts: list[list[int]], budget: int) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, cut to leave `budget` positions."""
        kept = [self.fitted(ids, budget) for ids in prompts]
        padded = self.tokenizer.pad({"input_ids": kept}, return_tensors="pt")
        return {
            name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }

    def _generate(self, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
        start = inputs["input_ids"].shape[1]
        processors = [Calculator(self.tokenizer, start)] if self.has_calculator else []
        with _naming_shortage(len(inputs["input_ids"])):
            return generate_greedily(
                self.model,
                inputs,
                self.tokenizer.pad_token_id,
                self.eos_token_ids,
                processors,
                self.tokenizer,
                **settings,
            )

    # --- answers ---

    def answers(self, prompts: list[str], max_new_tokens: int = 96) -> list[str]:
        """The answer to each prompt, as text without special tokens."""
        if not prompts:  # tokenizers fail on an empty list
            return []
        encoded = [self.prompt_ids(prompt) for prompt in prompts]
        budget = self.answer_budget(encoded, max_new_tokens)
        stop = () if self.is_chat else ("\nQuestion:",)
        return [
            answer
            for start in range(0, len(prompts), self.batch_size)
            for answer in self.complete(encoded[start : start + self.batch_size], budget, stop)
        ]

    def complete(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        """The model's completion of each prompt, generated as one batch.

        Args:
            prompts: token ids.
            max_new_tokens: at most `answer_budget`.
            stop: strings at which an answer ends; they are removed.

        Returns:
            The texts, without special tokens, calculator calls written as `<<6*7=42>>`.

        Raises:
            MemoryShortage: if the batch does not fit on the GPU.
        """
        inputs = self._inputs(prompts, max_new_tokens)
        output = self._generate(
            inputs, max_new_tokens=max_new_tokens, stop_strings=list(stop) or None
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        answers = [self._text(ids) for ids in new.tolist()]
        for string in stop:
            answers = [answer.partition(string)[0] for answer in answers]
        return answers

    def _text(self, ids: list[int]) -> str:
        """Decode an answer without special tokens, calculator calls as in GSM8K: `<<6*7=42>>`."""
        if not self.has_calculator:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        call, end, output, output_end = self.tokenizer.convert_tokens_to_ids(list(TOOL_TOKENS))
        marks, text = {call: "<<", end: ">>", output: "=", output_end: ">>"}, ""
        start = 0
        for index, token in enumerate([*ids, None]):
            if token in marks or token is None:
                text += self.tokenizer.decode(ids[start:index], skip_special_tokens=True)
                text += marks.get(token, "")
                start = index + 1
        return text.replace(">>=", "=")

    def choose(self, prompts: list[list[int]], choices: list[list[int]]) -> list[int]:
        """The choice with the highest probability after each prompt, in one batch.

        Only the choices' logits at the position of the answer are compared, as in
        karpathy/nanochat's chat_eval.py.

        Args:
            prompts: token ids up to the answer, as `split_choices` returns them.
            choices: for each prompt the token of each choice.

        Returns:
            For each prompt the index of the top choice; ties go to the first.
        """
        inputs = self._inputs(prompts, 1)
        # generate handles position ids after left padding, and computes the last logits only
        output = self._generate(
            inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        logits = output.logits[0].float()  # [prompts, vocabulary]
        return [int(logits[row, tokens].argmax()) for row, tokens in enumerate(choices)]

    def split_choices(self, prompt: str, choices: Sequence[str]) -> tuple[list[int], list[int]]:
        """Encode a prompt of which each choice is an answer: a common prompt and answer tokens.

        It is encoded with its answers, so that each answer is the token it is in training, with a
        leading space or without.

        Returns:
            Token ids of the common prefix, and the token that follows it for each choice.

        Raises:
            DataError: if two answers have the same token.
        """
        encoded = [self.prompt_ids(prompt, answer=choice) for choice in choices]
        common = os.path.commonprefix(encoded)  # noqa: RUF071 - of lists of token ids
        tokens = [ids[len(common)] for ids in encoded if len(ids) > len(common)]
        if len(set(tokens)) < len(choices):
            raise DataError(f"the tokenizer does not tell the choices apart: {prompt[-200:]!r}")
        return common, tokens

    @torch.no_grad()
    def losses(self, rows: list[dict[str, list[int]]]) -> list[dict[str, float]]:
        """The cross-entropy of token ids, in one batch.

        Args:
            rows: `input_ids`, and `labels` unless every token is predicted; -100 is ignored.

        Returns:
            For each row: `loss` (summed, in nats) and `tokens`; and `text_loss` and `bytes` (UTF-8)
            of its text alone, without special tokens.

        Raises:
            MemoryShortage: if the batch does not fit on the GPU.
        """
        inputs, labels = self._padded(rows)
        width = labels.shape[1]
        positions = (labels.flatten() != IGNORED).nonzero().flatten()  # of rows laid end to end
        targets = labels.flatten()[positions]
        with _naming_shortage(len(rows)):
            losses = self._token_losses(inputs, positions, targets).cpu()
        special = torch.tensor(self.tokenizer.convert_tokens_to_ids(special_tokens(self.tokenizer)))
        is_text = ~torch.isin(targets, special)
        of_row = positions // width
        return [
            {
                "loss": losses[mine].cpu().double().sum().item(),
                "tokens": int(mine.sum()),
                "text_loss": losses[mine & is_text].cpu().double().sum().item(),
                "bytes": len(self.tokenizer.decode(targets[mine & is_text]).encode()),
            }
            for mine in (of_row == index for index in range(len(rows)))
        ]

    def _padded(
        self, rows: list[dict[str, list[int]]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Right-padded inputs, and at each position the label of the next token; [rows, tokens]."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row.get("labels", row["input_ids"]))
            mask[index, :length] = 1
        shifted = torch.cat([labels[:, 1:], torch.full((len(rows), 1), IGNORED)], dim=1)
        return {"input_ids": ids, "attention_mask": mask}, shifted

    @cached_property
    def _is_fused(self) -> bool:
        return fuse_head(self.model)

    def _token_losses(
        self, inputs: dict[str, torch.Tensor], positions: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy in nats at the given positions, [positions]."""
        device = self.model.device
        inputs = {name: values.to(device) for name, values in inputs.items()}
        positions, targets = positions.to(device), targets.to(device)
        if self._is_fused:  # logits of 8 x 1,024 tokens and 65,536 vocabulary entries take 2 GiB
            return self.model(**inputs, targets=targets, target_positions=positions, each=True)[0]
        logits = self.model(**inputs).logits.flatten(0, 1)[positions].float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@contextmanager
def _naming_shortage(rows: int) -> Iterator[None]:
    """Turn an out-of-memory error of a batch into one that names the option to change."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryShortage(
            f"a batch of {rows} prompts does not fit into the GPU's memory; pass a smaller "
            "--batch_size"
        ) from None
