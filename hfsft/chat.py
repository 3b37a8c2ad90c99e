"""Chat with a model in the terminal; its answers are streamed."""

from collections.abc import Iterator
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from hfsft.errors import ModelError, printable
from hfsft.evaluation.answering import load_for_answers, load_its_tokenizer
from hfsft.terminal import Terminal
from hfsft.tokens.foreign_templates import prompt_text


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
    ):
        """Load the model.

        Args:
            model: a folder or a Hub id.
            system: an optional system message.
            max_new_tokens: at most this many per answer.
            temperature: of the sampling; 0 decodes the top-1 token.
            top_k: sample from this many of the most probable tokens.
            seed: of the sampling.

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
        self.messages = [{"role": "system", "content": system}] if system else []

    def stream(self, prompt: str) -> Iterator[str]:
        """Send a message and yield the answer in segments; both are added to `messages`."""
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
        segments = []
        for segment in streamer:
            segments.append(segment)
            yield segment
        thread.join()
        self.messages.append({"role": "assistant", "content": "".join(segments)})

    def answer(self, prompt: str) -> str:
        """Send a message and return the complete answer."""
        return "".join(self.stream(prompt))


def talk(chat: Chat) -> None:
    """Chat until the user exits with /exit, Ctrl-D or Ctrl-C."""
    console = Terminal(highlight=False)
    console.print("Type a message. /clear starts over; /exit or Ctrl-D exits.", style="dim")
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
                for segment in chat.stream(prompt):
                    console.out(printable(segment), end="")
                console.print()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
