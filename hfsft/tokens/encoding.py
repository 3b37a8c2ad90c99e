"""`messages` to token ids, with the trained ones marked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfsft.tokens import templates
from hfsft.tokens.formats import BadRow, Messages

IGNORED = -100  # the label of a token that is not trained on, in torch and transformers


class TooLong(Exception):
    """A conversation above `max_length` where `on_too_long` is error."""


# --- encoding ---

# a piece of a rendered conversation: its text, whether a special token's, and whether trained;
# None is a tool's result, which is not trained on whatever `assistant_only` says
Piece = tuple[str, bool, bool | None]


def nanochat_pieces(messages: Messages) -> list[Piece]:
    """Render messages as chat_templates/nanochat.jinja does: (text, is special, is trained).

    Tool calls and their results are parts of the assistant's one turn, as in nanochat's GSM8K: a
    call is a python part that holds `{"name": ..., "arguments": ...}`, its result a python_output.
    """
    pieces: list[Piece] = [("<|bos|>", True, False)]
    system, in_turn = "", False
    for index, message in enumerate(messages):
        content, role = message["content"], message["role"]
        if role == "system":
            if index:
                raise BadRow("a system turn in the middle, which the chat template cannot write")
            system = content + "\n\n"
        elif role == "user":
            pieces += [
                ("<|user_start|>", True, False),
                (system + content, False, False),
                ("<|user_end|>", True, False),
            ]
            system = ""
        elif role == "tool":
            pieces += _tool_part("output", content, None)
        else:
            if not in_turn:
                pieces.append(("<|assistant_start|>", True, False))
            for part in (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            ):
                if part["type"] == "text":
                    pieces.append((part["text"], False, True))
                elif part["type"] == "python":
                    pieces += _tool_part("python", part["text"], True)
                else:
                    pieces += _tool_part("output", part["text"], None)
            for call in message.get("tool_calls", ()):
                pieces += _tool_part("python", _call_text(call), True)
            in_turn = "tool_calls" in message
            if not in_turn:
                pieces.append(("<|assistant_end|>", True, True))
    return pieces


def _tool_part(kind: str, text: str, trained: bool | None) -> list[Piece]:
    start, end = f"<|{kind}_start|>", f"<|{kind}_end|>"
    return [(start, True, trained), (text, False, trained), (end, True, trained)]


def _call_text(call: dict[str, Any]) -> str:
    return json.dumps(call["function"], ensure_ascii=False)


def chatml_pieces(messages: Messages) -> list[Piece]:
    """Render messages as chat_templates/chatml.jinja does: (text, is special, is trained).

    Tool calls and results are written as Hermes and Qwen write them: `<tool_call>` with a line of
    `{"name": ..., "arguments": ...}` in the assistant's turn, and each result in a turn of role
    tool between `<tool_response>` lines. A system turn may stand anywhere. What follows
    "assistant\\n" is encoded apart from it, as a chat's prompt ends there.
    """
    pieces: list[Piece] = []
    for message in messages:
        content, role = message["content"], message["role"]
        trained = None if role == "tool" else False
        pieces.append(("<|im_start|>", True, trained))
        if role == "assistant":
            calls = [
                f"<tool_call>\n{_call_text(call)}\n</tool_call>"
                for call in message.get("tool_calls", ())
            ]
            text = text_alone(message)
            pieces.append(("assistant\n", False, False))
            pieces.append(("\n".join([text] * bool(text) + calls), False, True))
        elif role == "tool":
            text = f"tool\n<tool_response>\n{content}\n</tool_response>"
            pieces.append((text, False, None))
        else:
            pieces.append((f"{role}\n{content}", False, False))
        pieces += [("<|im_end|>", True, role == "assistant" or trained), ("\n", False, trained)]
    return pieces


def text_alone(message: dict[str, Any]) -> str:
    """A message's text without python parts and results, for templates that cannot write them."""
    content = message["content"]
    if isinstance(content, str):
        return content
    text = "".join(part["text"] for part in content if part["type"] == "text")
    if not text.strip() and "tool_calls" not in message:
        raise BadRow("tool calls alone, which the chat template cannot write")
    return text


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool, one a token
    cut: bool = False  # to `max_length`

    @property
    def labels(self) -> np.ndarray:
        """The ids that are trained on, -100 elsewhere; int32."""
        return np.where(self.trained, self.ids, np.int32(IGNORED))


def encode_conversations(
    conversations: list[Messages], tokenizer: Any, assistant_only: bool = True
) -> list[Encoded | BadRow]:
    """Encode conversations, all their texts in one call of the tokenizer.

    A special token written inside a message is never read as one.

    Args:
        conversations: each as `check_messages` returns it.
        tokenizer: as `load_tokenizer` returns it.
        assistant_only: train on the assistant's tokens and its end-of-turn token alone; otherwise
            on every token but the results of tool calls.

    Returns:
        One a conversation; where the template cannot write it, a `BadRow` with the reason.
    """
    pieces_of = {"nanochat": nanochat_pieces, "chatml": chatml_pieces}.get(tokenizer.hfsft_template)
    if pieces_of is None:
        return [_encode_foreign(messages, tokenizer, assistant_only) for messages in conversations]
    rendered: list[list[Piece] | BadRow] = []
    for messages in conversations:
        try:
            rendered.append(pieces_of(messages))
        except BadRow as bad:
            rendered.append(bad)
    written = [pieces for pieces in rendered if not isinstance(pieces, BadRow)]
    texts = [text for pieces in written for text, special, _ in pieces if not special]
    encoded = iter(encode_texts(texts, tokenizer))
    special_ids = {
        text: [tokenizer.convert_tokens_to_ids(text)]
        for text in {text for pieces in written for text, special, _ in pieces if special}
    }
    found: list[Encoded | BadRow] = []
    for pieces in rendered:
        if isinstance(pieces, BadRow):
            found.append(pieces)
            continue
        ids: list[int] = []
        lengths, marks = [], []
        for text, special, trained in pieces:
            piece = special_ids[text] if special else next(encoded)
            ids += piece
            lengths.append(len(piece))
            marks.append(trained or (not assistant_only and trained is not None))
        found.append(Encoded(np.array(ids, np.int32), np.repeat(np.array(marks, bool), lengths)))
    return found


def encode_texts(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, in parallel on every core; a special token in it is read as text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        # encode_batch also counts each token's characters, for a third of its time
        return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def _encode_foreign(messages: Messages, tokenizer: Any, assistant_only: bool) -> Encoded | BadRow:
    try:
        plain = [message | {"content": text_alone(message)} for message in messages]
        ids, mask = templates.encode(plain, tokenizer, assistant_only)
    except BadRow as bad:
        return bad
    except templates.TemplateError as error:
        return BadRow(str(error))
    return Encoded(np.array(ids, np.int32), np.array(mask, bool))


def encode_conversation(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[list[int], list[int]]:
    """Encode one conversation; arguments as `encode_conversations`.

    Returns:
        Token ids and labels of the same length; untrained labels are -100.

    Raises:
        BadRow: where the template cannot write the conversation.
    """
    (encoded,) = encode_conversations([messages], tokenizer, assistant_only)
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded.ids.tolist(), encoded.labels.tolist()


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
        max_length: tokens; None: as long as it is.
        on_too_long: "truncate" keeps the beginning and cuts no character in two; "drop" refuses it;
            "split" makes several of it, each with the system message and whole exchanges, and
            truncates an exchange that is too long by itself; "error" gives `TooLong`.
        assistant_only: as `encode_conversations`.

    Returns:
        For each what it became, several only where it was split; or why it is refused, also where
        no trained token is left.
    """
    found: list[list[Encoded] | BadRow | TooLong] = []
    encoded = encode_conversations(conversations, tokenizer, assistant_only)
    for messages, whole in zip(conversations, encoded, strict=True):
        try:
            if isinstance(whole, BadRow):
                raise whole
            if max_length is None or len(whole.ids) <= max_length:
                found.append([_checked_trained(whole)])
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
                end = _character_end(whole.ids, max_length, tokenizer)
                found.append(
                    [_checked_trained(Encoded(whole.ids[:end], whole.trained[:end], True))]
                )
        except (BadRow, TooLong) as reason:
            found.append(reason)
    return found


def _checked_trained(encoded: Encoded) -> Encoded:
    # the first token is predicted by none before it
    if not encoded.trained[1:].any():
        raise BadRow("nothing left to train on")
    return encoded


def _character_end(ids: np.ndarray, end: int, tokenizer: Any) -> int:
    """The last position up to `end` that cuts no character: one takes at most four byte tokens."""
    for position in range(end, max(end - 4, 0), -1):
        last = ids[max(0, position - 8) : position].tolist()
        if not tokenizer.decode(last).endswith("\ufffd"):
            return position
    return end  # the text itself holds replacement characters


def _exchanges(messages: Messages) -> Iterator[Messages]:
    """Each user's turn with all that answers it; the system message at the beginning is in none."""
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
    """Cut a conversation between exchanges, as few times as its exchanges in order allow."""
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
