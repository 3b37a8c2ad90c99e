"""`messages` to token ids, with the tokens to train on marked.

A conversation is first rendered as segments of text, each special or not and trained or not; then
the texts of a batch are tokenized together. Each segment is tokenized by itself, so a special token
written inside a message stays plain text. Templates other than hfsft's two are rendered by Jinja in
`foreign_templates.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfsft.errors import DataError, first_line, quoted
from hfsft.tokens import foreign_templates
from hfsft.tokens.row_formats import BadRow, Messages

IGNORED = -100  # the label of a token that is not trained on, in torch and transformers


class TooLong(Exception):
    """A conversation above `max_length`, where `on_too_long` is error."""


# --- rendering ---

# a segment of a rendered conversation: its text, whether it is a special token, and whether it is
# trained on; None: a tool's result, which is never trained on, whatever `assistant_only` is
Segment = tuple[str, bool, bool | None]


def nanochat_segments(messages: Messages) -> list[Segment]:
    """Render messages as chat_templates/nanochat.jinja does.

    Tool calls and their results are parts of one assistant turn, as in nanochat's GSM8K: a call is
    a python part with `{"name": ..., "arguments": ...}`, its result a python_output part.

    Args:
        messages: as `check_messages` returns them.

    Raises:
        BadRow: if the template cannot render them.
    """
    segments: list[Segment] = [("<|bos|>", True, False)]
    system, in_turn = "", False
    for index, message in enumerate(messages):
        content, role = message["content"], message["role"]
        if role == "system":
            if index:
                raise BadRow("a later system message, which the chat template cannot render")
            system = content + "\n\n"
        elif role == "user":
            segments += [
                ("<|user_start|>", True, False),
                (system + content, False, False),
                ("<|user_end|>", True, False),
            ]
            system = ""
        elif role == "tool":
            segments += _tool_part("output", content, None)
        else:
            if not in_turn:
                segments.append(("<|assistant_start|>", True, False))
            segments += _assistant_parts(message)
            in_turn = "tool_calls" in message
            if not in_turn:
                segments.append(("<|assistant_end|>", True, True))
    return segments


def _assistant_parts(message: dict[str, Any]) -> list[Segment]:
    """The text, python parts and tool calls of an assistant message, in nanochat's form."""
    content, segments = message["content"], []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            segments.append((part["text"], False, True))
        elif part["type"] == "python":
            segments += _tool_part("python", part["text"], True)
        else:
            segments += _tool_part("output", part["text"], None)
    for call in message.get("tool_calls", ()):
        segments += _tool_part("python", _call_text(call), True)
    return segments


def _tool_part(kind: str, text: str, trained: bool | None) -> list[Segment]:
    start, end = f"<|{kind}_start|>", f"<|{kind}_end|>"
    return [(start, True, trained), (text, False, trained), (end, True, trained)]


def _call_text(call: dict[str, Any]) -> str:
    return json.dumps(call["function"], ensure_ascii=False)


def chatml_segments(messages: Messages) -> list[Segment]:
    """Render messages as chat_templates/chatml.jinja does.

    Tool calls and results have the form of Hermes and Qwen: `<tool_call>` with a line of
    `{"name": ..., "arguments": ...}` in the assistant's turn, and each result in a turn of role
    tool between `<tool_response>` lines. System messages may come anywhere. The text after
    "assistant\\n" is a segment of its own, because a chat's prompt ends there.

    Args:
        messages: as `check_messages` returns them.

    Raises:
        BadRow: if the template cannot render them.
    """
    segments: list[Segment] = []
    for message in messages:
        content, role = message["content"], message["role"]
        trained = None if role == "tool" else False
        segments.append(("<|im_start|>", True, trained))
        if role == "assistant":
            calls = [
                f"<tool_call>\n{_call_text(call)}\n</tool_call>"
                for call in message.get("tool_calls", ())
            ]
            text = plain_text(message)
            segments.append(("assistant\n", False, False))
            segments.append(("\n".join([text] * bool(text) + calls), False, True))
        elif role == "tool":
            text = f"tool\n<tool_response>\n{content}\n</tool_response>"
            segments.append((text, False, None))
        else:
            segments.append((f"{role}\n{content}", False, False))
        segments += [("<|im_end|>", True, role == "assistant" or trained), ("\n", False, trained)]
    return segments


def plain_text(message: dict[str, Any]) -> str:
    """A message's text without python parts and their outputs, which only nanochat has.

    Raises:
        BadRow: if nothing remains.
    """
    content = message["content"]
    if isinstance(content, str):
        return content
    text = "".join(part["text"] for part in content if part["type"] == "text")
    if not text.strip() and "tool_calls" not in message:
        raise BadRow("only tool calls, which the chat template cannot render")
    return text


# --- encoding ---


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray  # int32 [tokens]
    trained: np.ndarray  # bool [tokens]
    truncated: bool = False  # to `max_length`

    @property
    def labels(self) -> np.ndarray:
        """The ids of trained tokens, -100 elsewhere; int32 [tokens]."""
        return np.where(self.trained, self.ids, np.int32(IGNORED))


def encode_conversations(
    conversations: list[Messages], tokenizer: Any, assistant_only: bool = True
) -> list[Encoded | BadRow]:
    """Encode conversations, all their texts in one call of the tokenizer.

    A special token written inside a message is encoded as plain text.

    Args:
        conversations: each as `check_messages` returns it.
        tokenizer: as `load_tokenizer` returns it.
        assistant_only: train only on the assistant's tokens and its end-of-turn tokens; otherwise
            on every token except the results of tool calls.

    Returns:
        One per conversation; a `BadRow` with the reason if the template cannot render it.
    """
    render = {"nanochat": nanochat_segments, "chatml": chatml_segments}.get(
        tokenizer.hfsft_template
    )
    if render is None:
        return [_encode_foreign(messages, tokenizer, assistant_only) for messages in conversations]
    rendered: list[list[Segment] | BadRow] = []
    for messages in conversations:
        try:
            rendered.append(render(messages))
        except BadRow as bad:
            rendered.append(bad)
    written = [segments for segments in rendered if not isinstance(segments, BadRow)]
    texts = [text for segments in written for text, special, _ in segments if not special]
    encoded = iter(encode_texts(texts, tokenizer))
    special_ids = {
        text: [tokenizer.convert_tokens_to_ids(text)]
        for text in {text for segments in written for text, special, _ in segments if special}
    }
    found: list[Encoded | BadRow] = []
    for segments in rendered:
        if isinstance(segments, BadRow):
            found.append(segments)
            continue
        ids: list[int] = []
        lengths, marks = [], []
        for text, special, trained in segments:
            segment_ids = special_ids[text] if special else next(encoded)
            ids += segment_ids
            lengths.append(len(segment_ids))
            marks.append(trained or (not assistant_only and trained is not None))
        found.append(Encoded(np.array(ids, np.int32), np.repeat(np.array(marks, bool), lengths)))
    return found


def tokenizer_key(tokenizer: Any) -> str:
    """All of a tokenizer that the ids of a text depend on, for the key of cached rows."""
    backend = tokenizer.backend_tokenizer
    # left by an earlier caller, they would be part of the key
    backend.no_truncation()
    backend.no_padding()
    return hashlib.blake2b(backend.to_str().encode()).hexdigest()


def encode_texts(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, in parallel on all cores; special tokens in it are plain text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        # encode_batch would also compute character offsets, a third of its time
        return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust code, such as a regular expression's
            raise
        longest = max(texts, key=len)
        raise DataError(
            f"the tokenizer fails on a text of up to {len(longest):,} characters: "
            f"{first_line(error)}\n  It is among those that begin like {quoted(longest)}"
        ) from None
    finally:
        backend.encode_special_tokens = before


def _encode_foreign(messages: Messages, tokenizer: Any, assistant_only: bool) -> Encoded | BadRow:
    """Encode a conversation through a template that is not hfsft's."""
    try:
        plain = [message | {"content": plain_text(message)} for message in messages]
        ids, mask = foreign_templates.encode(plain, tokenizer, assistant_only)
    except BadRow as bad:
        return bad
    except foreign_templates.TemplateError as error:
        return BadRow(str(error))
    return Encoded(np.array(ids, np.int32), np.array(mask, bool))


def encode_conversation(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[list[int], list[int]]:
    """Encode one conversation; arguments as `encode_conversations`.

    Returns:
        Token ids and labels of the same length; the labels of untrained tokens are -100.

    Raises:
        BadRow: if the template cannot render it.
    """
    (encoded,) = encode_conversations([messages], tokenizer, assistant_only)
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded.ids.tolist(), encoded.labels.tolist()


# --- fitting into max_length ---


def fit_conversations(
    conversations: list[Messages],
    tokenizer: Any,
    max_length: int | None,
    on_too_long: str = "truncate",
    assistant_only: bool = True,
) -> list[list[Encoded] | BadRow | TooLong]:
    """Encode conversations into at most `max_length` tokens each, as `on_too_long` says.

    Args:
        conversations: each as `check_messages` returns it.
        tokenizer: as `load_tokenizer` returns it.
        max_length: tokens; None: no limit.
        on_too_long: "truncate" keeps the beginning and splits no character; "drop" refuses it;
            "split" makes several of it, each with the system message and complete exchanges, and
            truncates an exchange that is too long by itself; "error" gives `TooLong`.
        assistant_only: as `encode_conversations`.

    Returns:
        For each the conversations it became, several only if it was split; or why it is refused,
        also if no trained token is left.
    """
    found: list[list[Encoded] | BadRow | TooLong] = []
    encoded = encode_conversations(conversations, tokenizer, assistant_only)
    for messages, full in zip(conversations, encoded, strict=True):
        try:
            if isinstance(full, BadRow):
                raise full
            if max_length is None or len(full.ids) <= max_length:
                found.append([_require_trained(full)])
            elif on_too_long == "error":
                raise TooLong
            elif on_too_long == "drop":
                raise BadRow("longer than max_length")
            elif on_too_long == "split" and len(list(_exchanges(messages))) > 1:
                parts = _split(messages, tokenizer, max_length, assistant_only)
                fitted = fit_conversations(parts, tokenizer, max_length, "truncate", assistant_only)
                for part in fitted:
                    if not isinstance(part, list):
                        raise part
                found.append([part[0] for part in fitted])
            else:
                end = _character_end(full.ids, max_length, tokenizer)
                truncated = Encoded(full.ids[:end], full.trained[:end], truncated=True)
                found.append([_require_trained(truncated)])
        except (BadRow, TooLong) as reason:
            found.append(reason)
    return found


def _require_trained(encoded: Encoded) -> Encoded:
    """The conversation itself, if it has a trained token."""
    # no position predicts the first token
    if not encoded.trained[1:].any():
        raise BadRow("nothing left to train on")
    return encoded


def _character_end(ids: np.ndarray, end: int, tokenizer: Any) -> int:
    """The last position up to `end` that splits no character, of at most four byte tokens."""
    for position in range(end, max(end - 4, 0), -1):
        last = ids[max(0, position - 8) : position].tolist()
        if not tokenizer.decode(last).endswith("\ufffd"):
            return position
    return end  # the text itself has replacement characters


def _exchanges(messages: Messages) -> Iterator[Messages]:
    """Each user turn with everything that answers it, without the first system message."""
    exchange: Messages = []
    for message in messages[1:] if messages[0]["role"] == "system" else messages:
        if (
            message["role"] in ("user", "system")
            and exchange
            and exchange[-1]["role"] == "assistant"
        ):
            yield exchange
            exchange = []
        exchange.append(message)
    yield exchange


def _split(
    messages: Messages, tokenizer: Any, max_length: int, assistant_only: bool
) -> list[Messages]:
    """Split a conversation between exchanges, greedily into as few parts as possible."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    parts: list[Messages] = []
    for exchange in _exchanges(messages):
        longer = [*(parts[-1] if parts else system), *exchange]
        fits = len(encode_conversation(longer, tokenizer, assistant_only)[0]) <= max_length
        if parts and fits:
            parts[-1] = longer
        else:
            parts.append([*system, *exchange])
    return parts
