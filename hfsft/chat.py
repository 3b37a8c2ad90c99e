"""Talk to a model in the terminal, its answer streamed as it is made."""

from collections.abc import Iterator
from threading import Thread

import torch
from rich.console import Console
from transformers import TextIteratorStreamer

from hfsft.errors import ModelError
from hfsft.evaluation.answering import load_for_answers, load_its_tokenizer
from hfsft.tokens.templates import prompt_text


class Chat:
    """A conversation with a model; `messages` holds what was said so far."""

    def __init__(
        self,
        model: str,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 50,
        seed: int = 42,
    ):
        """Load the model.

        Args:
            model: a folder or a Hub id.
            system: a system message to begin with.
            max_new_tokens: tokens an answer at most.
            temperature: 0 takes the likeliest token each time.
            top_k: sample from this many likeliest tokens.
            seed: of the sampling.

        Raises:
            ModelError: if there is no such model, or it has no chat template.
        """
        self.tokenizer = load_its_tokenizer(model)
        if not self.tokenizer.chat_template:
            raise ModelError(f"{model}: has no chat template; it is no chat model")
        self.model = load_for_answers(model)
        torch.manual_seed(seed)
        self.sampling = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.sampling |= {"temperature": temperature, "top_k": top_k}
        self.messages = [{"role": "system", "content": system}] if system else []

    def stream(self, prompt: str) -> Iterator[str]:
        """Say something; yields the answer piece by piece and keeps both in `messages`."""
        self.messages.append({"role": "user", "content": prompt})
        text = prompt_text(self.messages, self.tokenizer)
        inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(
            self.model.device
        )
        inputs.pop("token_type_ids", None)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = Thread(
            target=self.model.generate,
            kwargs={**inputs, **self.sampling, "streamer": streamer},
            daemon=True,
        )
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        thread.join()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def answer(self, prompt: str) -> str:
        """Say something; returns the whole answer."""
        return "".join(self.stream(prompt))


def talk(chat: Chat) -> None:
    """Talk until the user leaves with an empty line's end, /exit, Ctrl-D or Ctrl-C."""
    console = Console(highlight=False)
    console.print("Ask something. /clear begins anew, /exit or Ctrl-D leaves.", style="dim")
    system = list(chat.messages)
    while True:
        try:
            prompt = console.input("[bold]you:[/] ").strip()
            if prompt == "/exit":
                return
            if prompt == "/clear":
                chat.messages = list(system)
            elif prompt:
                console.print("model: ", style="bold", end="")
                for piece in chat.stream(prompt):
                    console.out(piece, end="")
                console.print()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
