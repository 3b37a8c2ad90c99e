"""A model that answers: loaded to be asked, and asked in batches, with its calculator at hand."""

import json
import os
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
from hfsft.hub.client import require_model
from hfsft.model.head import fuse_head
from hfsft.model.loading import bf16_is_native, load_plain_model
from hfsft.recipe.schema import Stage
from hfsft.tokens.encoding import IGNORED
from hfsft.tokens.templates import bounded, prompt_text, special_tokens

# what frames a call of the calculator and its result, as in karpathy/nanochat
TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


NANOCHAT_BOS = "<|bos|>"  # begins every document that a nanochat model has seen


def load_for_answers(model: str) -> Any:
    """Load a model to be asked, in bfloat16 on a GPU that computes in it, else in float32.

    Args:
        model: a folder or a Hub id.

    Raises:
        ModelError: if it cannot be loaded.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bare = Stage(name="", folder=Path(), seed=0, data=[], held_out=0)
    loaded = load_plain_model(model, bare, dtype=answer_dtype()).eval()
    return loaded.to("cuda") if torch.cuda.is_available() else loaded


def answer_dtype() -> str:
    """The precision in which models answer on this machine."""
    on_gpu = torch.cuda.is_available() and bf16_is_native()
    return "bfloat16" if on_gpu else "float32"


def load_its_tokenizer(model: str) -> Any:
    """Load a model's tokenizer as it is, to pad on the left; one without a pad pads with its end.

    Raises:
        ModelError: if it cannot be loaded.
    """
    require_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, padding_side="left", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model}: cannot load its tokenizer: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{model}: its tokenizer has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: it is never seen
    return tokenizer


class Calculator(LogitsProcessor):
    """Writes the calculator's result behind each call, row by row, while a batch is generated."""

    def __init__(self, tokenizer: Any, start: int):
        """Set it up for one call of `generate`.

        Args:
            tokenizer: has `TOOL_TOKENS`.
            start: tokens of the padded prompts, in which no call is looked for.
        """
        self.tokenizer, self.start = tokenizer, start
        ids = tokenizer.convert_tokens_to_ids(list(TOOL_TOKENS))
        self.call, self.end, self.output, self.output_end = ids
        self.forced: dict[int, list[int]] = {}  # row → what it is still to say

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave a row but one token where its result is being written; scores [rows, tokens]."""
        for row in (input_ids[:, -1] == self.end).nonzero().flatten().tolist():
            self.forced.setdefault(row, self._result(input_ids[row, self.start :].tolist()))
        for row, tokens in list(self.forced.items()):
            if not tokens:
                del self.forced[row]
                continue
            scores[row] = -torch.inf
            scores[row, tokens.pop(0)] = 0.0
        return scores

    def _result(self, said: list[int]) -> list[int]:
        """The tokens that follow a call that has just ended; none if it was no sum."""
        calls = [place for place, token in enumerate(said) if token == self.call]
        if not calls:
            return []
        # special tokens are written out: what ends twice is no sum
        result = calculate(self.tokenizer.decode(said[calls[-1] + 1 : -1]))
        if result is None:
            return []
        written = self.tokenizer(result, add_special_tokens=False)["input_ids"]
        return [self.output, *written, self.output_end]


class Evaluator:
    """A model that answers batches of prompts, always taking the likeliest token.

    A model with a chat template is asked as a chat. Others, and hfsft's base stage, whose chat
    tokens are not trained yet, are asked `Question: ... Answer:`.
    """

    def __init__(self, folder: str, batch_size: int = 50):
        """Load the tokenizer; the weights are loaded when they are first needed.

        Args:
            folder: a model's, or a Hub id.
            batch_size: prompts that are answered at a time.

        Raises:
            ModelError: if it cannot be loaded.
        """
        self.tokenizer = load_its_tokenizer(folder)
        self.folder, self.batch_size = folder, batch_size
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from None
        record = Path(folder) / "stage.json"
        is_base = record.is_file() and json.loads(record.read_text())["stage"] == "base"
        self.is_chat = bool(self.tokenizer.chat_template) and not is_base
        # positions that it has learned, if it says so
        self.positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.has_calculator = set(TOOL_TOKENS) <= set(self.tokenizer.get_vocab())

    @cached_property
    def model(self) -> Any:
        """The weights."""
        return load_for_answers(self.folder)

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens at which an answer ends."""
        generation = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *_as_list(generation)} - {None}
        if self.tokenizer.bos_token == NANOCHAT_BOS:
            ends.add(self.tokenizer.bos_token_id)  # as in nanochat's engine
        return sorted(ends)

    # --- prompts ---

    def prompt_text(self, prompt: str, plain: str | None = None, answer: str | None = None) -> str:
        """A prompt as the model is to see it, special tokens written out.

        Args:
            prompt: what the user asks.
            plain: what a model that is no chat is to go on with, if not `Question: ... Answer:`.
            answer: is written behind it, as the model would.
        """
        if not self.is_chat:
            text = f"Question: {prompt}\nAnswer:" if plain is None else plain
            return text if answer is None else f"{text} {answer}"
        messages = [{"role": "user", "content": prompt}]
        if answer is None:
            return prompt_text(messages, self.tokenizer)
        messages.append({"role": "assistant", "content": answer})
        return bounded(
            self.folder, lambda: self.tokenizer.apply_chat_template(messages, tokenize=False)
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as `prompt_text` gives them."""
        # a chat template writes the beginning itself
        encoded = self.tokenizer(texts, add_special_tokens=not self.is_chat)["input_ids"]
        if not self.is_chat and self.tokenizer.bos_token == NANOCHAT_BOS:
            bos = self.tokenizer.bos_token_id
            encoded = [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
        return encoded

    def room(self, prompts: list[list[int]], max_new_tokens: int) -> int:
        """How many of `max_new_tokens` the model has positions for behind every one of the prompts.

        At least half of its positions; a prompt that leaves less loses its beginning.
        """
        if self.positions is None:
            return max_new_tokens
        longest = max(map(len, prompts), default=0)
        return min(max_new_tokens, max(self.positions - longest, self.positions // 2))

    def _inputs(self, prompts: list[list[int]], room: int) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, each cut at its beginning where they are too long."""
        most = None if self.positions is None else self.positions - room
        kept = [ids if most is None else ids[-most:] for ids in prompts]
        padded = self.tokenizer.pad({"input_ids": kept}, return_tensors="pt")
        return {
            name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }

    def _generate(self, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
        # not the model's own settings, which may sample or punish repetition
        config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._ends,
            **settings,
        )
        start = inputs["input_ids"].shape[1]
        processors = [Calculator(self.tokenizer, start)] if self.has_calculator else []
        try:
            return self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                tokenizer=self.tokenizer,
            )
        except torch.OutOfMemoryError:
            raise self._shortage(len(inputs["input_ids"])) from None

    def _shortage(self, rows: int) -> MemoryShortage:
        return MemoryShortage(
            f"{rows} prompts at a time are too many for the GPU's memory; pass a "
            "smaller --batch_size"
        )

    # --- answers ---

    def answers(self, prompts: list[str], max_new_tokens: int = 96) -> list[str]:
        """The answer to each prompt, as text without special tokens."""
        if not prompts:  # a tokenizer fails on none
            return []
        encoded = self.encode([self.prompt_text(prompt) for prompt in prompts])
        room = self.room(encoded, max_new_tokens)
        stop = () if self.is_chat else ("\nQuestion:",)
        return [
            answer
            for start in range(0, len(prompts), self.batch_size)
            for answer in self.go_on(encoded[start : start + self.batch_size], room, stop)
        ]

    def go_on(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        """How the model goes on, in one batch.

        Args:
            prompts: token ids.
            max_new_tokens: as `room` allows.
            stop: texts at which an answer ends; they are cut off.

        Returns:
            Its words, without special tokens, and with calls of the calculator as `<<6*7=42>>`.

        Raises:
            MemoryShortage: if the batch is too large for the GPU.
        """
        inputs = self._inputs(prompts, max_new_tokens)
        made = self._generate(
            inputs, max_new_tokens=max_new_tokens, stop_strings=list(stop) or None
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        answers = [self._text(ids) for ids in new.tolist()]
        for mark in stop:
            answers = [answer.partition(mark)[0] for answer in answers]
        return answers

    def _text(self, ids: list[int]) -> str:
        """An answer without special tokens; calls are written as GSM8K's: `<<6*7=42>>`."""
        if not self.has_calculator:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        call, end, output, output_end = self.tokenizer.convert_tokens_to_ids(list(TOOL_TOKENS))
        written, text = {call: "<<", end: ">>", output: "=", output_end: ">>"}, ""
        begin = 0
        for place, token in enumerate([*ids, None]):
            if token in written or token is None:
                text += self.tokenizer.decode(ids[begin:place], skip_special_tokens=True)
                text += written.get(token, "")
                begin = place + 1
        return text.replace(">>=", "=")

    def choose(self, prompts: list[list[int]], choices: list[list[int]]) -> list[int]:
        """Which of its choices each prompt is most likely to go on with, in one batch.

        Only the logits of the choices are compared, at the position of the answer, as in
        karpathy/nanochat's chat_eval.py.

        Args:
            prompts: token ids, up to where the choices part.
            choices: the token of each choice, for each prompt.

        Returns:
            The place of the likeliest; of several, the first.
        """
        inputs = self._inputs(prompts, 1)
        # generate minds the positions behind left padding, and the logits of one position
        made = self._generate(
            inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        logits = made.logits[0].float()  # [prompts, vocabulary]
        return [int(logits[row, tokens].argmax()) for row, tokens in enumerate(choices)]

    def parted(self, texts: list[str]) -> tuple[list[int], list[int]]:
        """What texts that differ in their answers alone share, and the token of each answer.

        Encoded whole, an answer is the token it is in training: with its space, or without.

        Returns:
            Token ids of their common beginning, and the token that follows in each.

        Raises:
            DataError: if the tokens do not tell the answers apart.
        """
        encoded = self.encode(texts)
        common = os.path.commonprefix(encoded)  # noqa: RUF071 - of lists of token ids
        tokens = [ids[len(common)] for ids in encoded if len(ids) > len(common)]
        if len(set(tokens)) < len(texts):
            raise DataError(f"the tokenizer does not tell the choices apart: {texts[0][-200:]!r}")
        return common, tokens

    @torch.no_grad()
    def losses(self, rows: list[dict[str, list[int]]]) -> list[dict[str, float]]:
        """What the model loses on token ids, in one batch.

        Args:
            rows: `input_ids`, and `labels` unless every token is to be predicted; -100 is not.

        Returns:
            For each row: `loss` (a sum, in nats), `tokens`, and `text_loss` and `bytes` of its text
            alone, without special tokens.
        """
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row.get("labels", row["input_ids"]))
            mask[index, :length] = 1
        labels = torch.cat([labels[:, 1:], torch.full((len(rows), 1), IGNORED)], dim=1).flatten()
        places = (labels != IGNORED).nonzero().flatten()
        targets = labels[places]
        device = self.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        try:
            losses = self._token_losses(inputs, places.to(device), targets.to(device)).cpu()
        except torch.OutOfMemoryError:
            raise self._shortage(len(rows)) from None
        special = torch.tensor(self.tokenizer.convert_tokens_to_ids(special_tokens(self.tokenizer)))
        is_text = ~torch.isin(targets, special)
        of_row = places // width
        return [
            {
                "loss": losses[mine].double().sum().item(),
                "tokens": int(mine.sum()),
                "text_loss": losses[mine & is_text].double().sum().item(),
                "bytes": len(self.tokenizer.decode(targets[mine & is_text]).encode()),
            }
            for mine in (of_row == index for index in range(len(rows)))
        ]

    @cached_property
    def _is_fused(self) -> bool:
        return fuse_head(self.model)

    def _token_losses(
        self, inputs: dict[str, torch.Tensor], places: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        if self._is_fused:  # the logits of 8 x 1,024 tokens of 65,536 words would take 2 GiB
            return self.model(**inputs, targets=targets, target_positions=places, each=True)[0]
        logits = self.model(**inputs).logits.flatten(0, 1)[places].float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return value if isinstance(value, list) else [value]
