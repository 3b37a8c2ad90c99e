"""Chat with a model in the terminal; its answers are streamed.

A model that is given tools may call them: the person at the terminal then types their results.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import LogitsProcessorList, TextIteratorStreamer

from hfsft.errors import DataError, ModelError, printable
from hfsft.evaluation.answering import (
    Calculator,
    has_calculator,
    load_for_answers,
    load_its_tokenizer,
)
from hfsft.evaluation.calling import split_calls
from hfsft.terminal import Terminal
from hfsft.tokens.foreign_templates import encode_prompt, prompt_text
from hfsft.tokens.messages import check_tools
from hfsft.tokens.training_flags import BadRow


class Chat:
    """A conversation with a model; `messages` holds its turns so far."""

    def __init__(
        self,
        model: str,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 50,
        seed: int = 42,
        tools: list[dict[str, Any]] | None = None,
    ):
        """Load the model.

        Args:
            model: a folder or a Hub id.
            system: an optional system message.
            max_new_tokens: at most this many per answer.
            temperature: of the sampling; 0 decodes the top-1 token.
            top_k: sample from this many of the most probable tokens.
            seed: of the sampling.
            tools: that it may call, in OpenAI's form.

        Raises:
            ModelError: if the model cannot be loaded, or has no chat template.
        """
        self.tokenizer = load_its_tokenizer(model)
        if not self.tokenizer.chat_template:
            raise ModelError(f"{model}: has no chat template, so it is not a chat model")
        self.model = load_for_answers(model)
        torch.manual_seed(seed)
        self.sampling = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.sampling |= {"temperature": temperature, "top_k": top_k}
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self.tools = tools

    def stream(self, prompt: str, role: str = "user") -> Iterator[str]:
        """Send a message and yield the answer in segments; both are added to `messages`.

        Args:
            prompt: the user's message, or with `role` "tool" the result of the next call.
            role: "user" or "tool"; as long as a call has no result, nothing is answered.

        Raises:
            ModelError: if the chat template refuses the message, or it leaves no room in the
                context; it is not added then.
        """
        if role == "tool":
            call = self.open_calls()[0]
            self.messages.append({"role": role, "name": call["name"], "content": prompt})
            if self.open_calls():
                return
        else:
            self.messages.append({"role": role, "content": prompt})
        try:
            ids, settings = self._prompt()
        except ModelError:
            del self.messages[-1]
            raise
        prompt_ids = torch.tensor([ids], device=self.model.device)
        inputs = {"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generated: list[int] = []
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                output = self.model.generate(**inputs, **settings, streamer=streamer)
                generated.extend(output[0, len(ids) :].tolist())
            except BaseException as error:
                failed.append(error)
                streamer.end()  # or the loop below would wait for ever

        thread = Thread(target=generate, daemon=True)
        thread.start()
        segments = []
        for segment in streamer:
            segments.append(segment)
            yield segment
        thread.join()
        if failed:
            raise failed[0]
        self.messages.append(self._as_message("".join(segments), generated))

    def _prompt(self) -> tuple[list[int], dict[str, Any]]:
        """The conversation as token ids, and the settings of `generate` for its answer."""
        ids, settings = encode_prompt(self.messages, self.tokenizer, self.tools), self.sampling
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:
            if len(ids) >= context:
                raise ModelError(
                    f"the conversation fills the context: {len(ids):,} of {context:,} tokens; "
                    "/clear starts over"
                )
            most = min(self.sampling["max_new_tokens"], context - len(ids))
            settings = settings | {"max_new_tokens": most}
        if has_calculator(self.tokenizer):
            calculator = LogitsProcessorList([Calculator(self.tokenizer, len(ids))])
            settings = settings | {"logits_processor": calculator}
        return ids, settings

    def _as_message(self, answer: str, generated: list[int]) -> dict[str, Any]:
        """An answer as a message, its calls taken apart if the model was given tools."""
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if not self.tools:
            return message
        if self.tokenizer.response_template is not None:
            whole = self.tokenizer.decode(generated)
            prompt = prompt_text(self.messages, self.tokenizer, self.tools)
            try:
                parsed = self.tokenizer.parse_response(whole, prefix=prompt, tools=self.tools)
                return {"role": "assistant", "content": "", **parsed}
            except ValueError:  # a call that is not JSON
                return message
        rest, functions = split_calls(answer)
        calls = [{"type": "function", "function": function} for function in functions]
        return message | ({"content": rest, "tool_calls": calls} if calls else {})

    def open_calls(self) -> list[dict[str, Any]]:
        """The functions that the model called and that have no result yet."""
        calls: list[dict[str, Any]] = []
        for message in self.messages:
            if message["role"] == "tool":
                calls = calls[1:]
            else:
                calls = [call["function"] for call in message.get("tool_calls", ())]
        return calls

    def answer(self, prompt: str) -> str:
        """Send a message and return the complete answer."""
        return "".join(self.stream(prompt))


def read_tools(path: str) -> list[dict[str, Any]]:
    """Read the descriptions of tools from a JSON file.

    Args:
        path: a list of them in OpenAI's form, or of functions alone.

    Raises:
        DataError: if it cannot be read as such.
    """
    try:
        return check_tools(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--tools {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"--tools {path}: not UTF-8 text") from None
    except BadRow as bad:
        raise DataError(f"--tools {path}: {bad}") from None


def talk(chat: Chat) -> None:
    """Chat until the user exits with /exit, Ctrl-D or Ctrl-C."""
    console = Terminal(highlight=False)
    console.print("Type a message. /clear starts over; /exit or Ctrl-D exits.", style="dim")
    if chat.tools:
        console.print("If the model calls a tool, type what it returns.", style="dim")
    system = list(chat.messages)
    while True:
        try:
            calls = chat.open_calls()
            if calls:
                called = f"{calls[0]['name']}({json.dumps(calls[0]['arguments'])})"
                console.out(printable(f"result of {called}: "), end="", style="bold")
                prompt = console.input().strip()
            else:
                prompt = console.input("[bold]you:[/] ").strip()
            if prompt == "/exit":
                return
            if prompt == "/clear":
                chat.messages = list(system)
            elif prompt or calls:
                console.print("model: " if len(calls) < 2 else "", style="bold", end="")
                for segment in chat.stream(prompt, "tool" if calls else "user"):
                    console.out(printable(segment), end="")
                console.print()
        except ModelError as error:
            console.print()  # after "model: "
            console.out(printable(str(error)))
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
