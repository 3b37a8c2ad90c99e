"""Answers in OpenAI's form: whole, as events of a stream, and errors."""

import json
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse

from hfsft.serve.engine import Piece, TokenChoice
from hfsft.serve.parameters import Asked, found_tool_calls

KINDS = {400: "invalid_request_error", 413: "invalid_request_error", 503: "overloaded_error"}
DONE = b"data: [DONE]\n\n"


def error_body(message: str, status: int, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    message: str,
    status: int = 400,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """A response with OpenAI's error object."""
    return JSONResponse(error_body(message, status, param, code), status, headers)


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


class Reply:
    """The reply to one request: its choices, gathered from pieces or passed on as events."""

    def __init__(self, asked: Asked, tokenizer: Any, is_chat: bool):
        """Start without a choice.

        Args:
            asked: the request.
            tokenizer: writes single tokens, for the log-probabilities.
            is_chat: of /v1/chat/completions; otherwise of /v1/completions.
        """
        self.asked, self.tokenizer, self.is_chat = asked, tokenizer, is_chat
        count = asked.n * len(asked.prompts)
        self.texts = [""] * count
        self.tokens = [0] * count
        self.finishes: list[str | None] = [None] * count
        self.choices: list[list[TokenChoice]] = [[] for _ in range(count)]
        kind = "chat.completion" if is_chat else "text_completion"
        self.base = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if is_chat and asked.is_streamed else kind,
            "created": int(time.time()),
            "model": asked.model,
        }

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return all(self.finishes)

    def add(self, index: int, piece: Piece) -> None:
        """Append a piece to a choice."""
        self.texts[index] += piece.text
        self.tokens[index] = piece.tokens
        self.finishes[index] = piece.finish
        if piece.choice:
            self.choices[index].append(piece.choice)

    def usage(self) -> dict[str, int]:
        """The tokens of the prompts and of all choices."""
        prompt, completion = sum(map(len, self.asked.prompts)), sum(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    # --- whole ---

    def body(self) -> dict[str, Any]:
        """The reply, once it is complete."""
        choices = [self._whole(index) for index in range(len(self.texts))]
        return self.base | {"choices": choices, "usage": self.usage()}

    def _whole(self, index: int) -> dict[str, Any]:
        logprobs = self._logprobs(self.choices[index])
        text, finish = self.texts[index], self.finishes[index]
        if not self.is_chat:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        message, finish = self._message(index)
        return {
            "index": index,
            "message": {"role": "assistant"} | message | {"refusal": None},
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def _message(self, index: int) -> tuple[dict[str, Any], str | None]:
        """The assistant's message without its role, and its finish reason."""
        text, finish = self.texts[index], self.finishes[index]
        rest, calls = found_tool_calls(text, self.asked.tools)
        message: dict[str, Any] = {"content": rest}
        if not calls:
            return message, finish
        message["content"] = rest or None
        message["tool_calls"] = [
            {
                "index": number,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": call,
            }
            for number, call in enumerate(calls)
        ]
        return message, "tool_calls" if finish == "stop" else finish

    # --- streamed ---

    def opening(self) -> bytes:
        """The events before the first piece."""
        if not self.is_chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, delta) for index in range(len(self.texts)))

    def events(self, index: int, piece: Piece) -> bytes:
        """The events of a piece that was added; with tools, a choice comes whole at its end."""
        finish, text = piece.finish, piece.text
        delta: dict[str, Any] = {"content": text} if text or piece.choice else {}
        if self.asked.tools:
            if not finish:
                return b""
            delta, finish = self._message(index)  # the opening named the role
        chosen = self.choices[index] if self.asked.tools else [piece.choice]
        logprobs = self._logprobs([choice for choice in chosen if choice])
        if self.is_chat:
            events = self._chunk(index, delta, logprobs) if delta else b""
            return events + (self._chunk(index, {}, None, finish) if finish else b"")
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event(self.base | {"choices": [choice]} | self._no_usage())

    def closing(self) -> bytes:
        """The events after the last piece."""
        if not self.asked.with_usage:
            return DONE
        return event(self.base | {"choices": [], "usage": self.usage()}) + DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(self.base | {"choices": [choice]} | self._no_usage())

    def _no_usage(self) -> dict[str, None]:
        return {"usage": None} if self.asked.with_usage else {}

    # --- log-probabilities ---

    def _logprobs(self, choices: list[TokenChoice]) -> dict[str, Any] | None:
        """The log-probabilities of tokens, in the form of either endpoint."""
        if self.asked.sampling.logprobs is None or not choices:
            return None
        if self.is_chat:
            content = [
                self._token(choice.token, choice.logprob)
                | {"top_logprobs": [self._token(*pair) for pair in choice.top]}
                for choice in choices
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self.tokenizer.decode([choice.token]) for choice in choices],
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                {self.tokenizer.decode([token]): logprob for token, logprob in choice.top}
                for choice in choices
            ],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        # a part of a character has no text of its own, and its bytes are not known
        octets = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": octets}
