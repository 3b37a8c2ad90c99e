"""Conversations to token ids, with the tokens to train on marked.

A conversation is first rendered as segments of text (`segments.py`); then the texts of a batch are
tokenized together. Each segment is tokenized by itself, so a special token written inside a message
stays plain text. Templates other than hfsft's two are rendered by Jinja in `foreign_templates.py`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfsft.errors import DataError, panics_as, quoted
from hfsft.tokens import turns
from hfsft.tokens.foreign_templates import TemplateError
from hfsft.tokens.messages import Conversation, Messages
from hfsft.tokens.segments import Segment, chatml_segments, nanochat_segments, plain_text
from hfsft.tokens.training_flags import BadRow

IGNORED = -100  # the label of a token that is not trained on, in torch and transformers


class TooLong(Exception):
    """A conversation above `max_length`, where `on_too_long` is error."""


# --- encoding ---


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray  # int32 [tokens]
    trained: np.ndarray  # bool [tokens]
    truncated: bool = False  # to `max_length`
    left_out: str = ""  # what the chat template does not write, though the rest is trained on

    @property
    def labels(self) -> np.ndarray:
        """The ids of trained tokens, -100 elsewhere; int32 [tokens]."""
        return np.where(self.trained, self.ids, np.int32(IGNORED))


def encode_conversations(
    conversations: list[Conversation], tokenizer: Any, assistant_only: bool = True
) -> list[Encoded | BadRow]:
    """Encode conversations, all their texts in one call of the tokenizer.

    A special token written inside a message is encoded as plain text. What a message says about
    training (its `train`) goes before `assistant_only`; where it names characters, a token is
    trained on if all of its characters are, a leading space aside.

    Args:
        conversations: each as `read_row` returns it.
        tokenizer: as `load_tokenizer` returns it.
        assistant_only: train only on the assistant's tokens and its end-of-turn tokens; otherwise
            on every token except the descriptions of tools and the results of their calls.

    Returns:
        One per conversation; a `BadRow` with the reason if the template cannot render it.
    """
    render = {"nanochat": nanochat_segments, "chatml": chatml_segments}.get(
        tokenizer.hfsft_template
    )
    if render is None:
        return [_encode_foreign(one, tokenizer, assistant_only) for one in conversations]
    rendered: list[list[Segment] | BadRow] = []
    for conversation in conversations:
        try:
            rendered.append(render(conversation))
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
        trained: list[bool] = []
        for text, special, marks in segments:
            segment_ids = special_ids[text] if special else next(encoded)
            ids += segment_ids
            trained += _trained_tokens(text, segment_ids, marks, assistant_only, tokenizer)
        found.append(Encoded(np.array(ids, np.int32), np.array(trained, bool)))
    return found


def _trained_tokens(
    text: str, ids: list[int], marks: Any, assistant_only: bool, tokenizer: Any
) -> list[bool]:
    """Which tokens of a segment are trained on."""
    runs = marks if isinstance(marks, list) else [(len(text), marks)]
    counts = [(length, mark or (not assistant_only and mark is not None)) for length, mark in runs]
    if len({trained for _, trained in counts}) == 1:
        return [counts[0][1]] * len(ids)
    characters = np.repeat([trained for _, trained in counts], [length for length, _ in counts])
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        offsets = backend.encode(text, add_special_tokens=False).offsets
    finally:
        backend.encode_special_tokens = before
    return turns.tokens_within(offsets, text, characters)


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
    longest = max(texts, key=len, default="")
    failed = f"the tokenizer fails on one of the texts such as {quoted(longest)} ({len(longest):,} "
    failed += "characters, the longest)"
    try:
        # encode_batch would also compute character offsets, a third of its time
        with panics_as(DataError, failed):
            return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def document_start(tokenizer: Any) -> int:
    """The token before each document: BOS, or EOS where there is none, as in Qwen's tokenizers."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _encode_foreign(
    conversation: Conversation, tokenizer: Any, assistant_only: bool
) -> Encoded | BadRow:
    """Encode a conversation through a template that is not hfsft's."""
    try:
        plain = [message | {"content": plain_text(message)} for message in conversation.messages]
        plain = conversation.with_messages(plain)
        ids, mask, left_out = turns.encode(plain, tokenizer, assistant_only)
    except BadRow as bad:
        return bad
    except TemplateError as error:
        return BadRow(str(error))
    return Encoded(np.array(ids, np.int32), np.array(mask, bool), left_out=left_out)


def encode_conversation(
    messages: Messages,
    tokenizer: Any,
    assistant_only: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> tuple[list[int], list[int]]:
    """Encode one conversation.

    Args:
        messages: as `check_messages` returns them.
        tokenizer: as `encode_conversations`.
        assistant_only: as `encode_conversations`.
        tools: as `check_tools` returns them.

    Returns:
        Token ids and labels of the same length; the labels of untrained tokens are -100.

    Raises:
        BadRow: if the template cannot render it.
    """
    conversation = Conversation(messages, tools or [])
    (encoded,) = encode_conversations([conversation], tokenizer, assistant_only)
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded.ids.tolist(), encoded.labels.tolist()


# --- fitting into max_length ---


def fit_conversations(
    conversations: list[Conversation],
    tokenizer: Any,
    max_length: int | None,
    on_too_long: str = "truncate",
    assistant_only: bool = True,
) -> list[list[Encoded] | BadRow | TooLong]:
    """Encode conversations into at most `max_length` tokens each, as `on_too_long` says.

    Args:
        conversations: each as `read_row` returns it.
        tokenizer: as `load_tokenizer` returns it.
        max_length: tokens; None: no limit.
        on_too_long: "truncate" keeps the beginning and splits no character; "drop" refuses it;
            "split" makes several of it, each with the system message and complete exchanges,
            truncates an exchange that is too long by itself, and leaves out a part without a
            trained token; "error" gives `TooLong`.
        assistant_only: as `encode_conversations`.

    Returns:
        For each the conversations it became, several only if it was split; or why it is refused,
        also if no trained token is left.
    """
    found: list[list[Encoded] | BadRow | TooLong] = []
    encoded = encode_conversations(conversations, tokenizer, assistant_only)
    for conversation, full in zip(conversations, encoded, strict=True):
        try:
            if isinstance(full, BadRow):
                raise full
            if max_length is None or len(full.ids) <= max_length:
                found.append([_require_trained(full)])
            elif on_too_long == "error":
                raise TooLong
            elif on_too_long == "drop":
                raise BadRow("longer than max_length")
            elif on_too_long == "split" and len(list(_exchanges(conversation.messages))) > 1:
                parts = _split(conversation, tokenizer, max_length, assistant_only)
                fitted = fit_conversations(parts, tokenizer, max_length, "truncate", assistant_only)
                kept = [part[0] for part in fitted if isinstance(part, list)]
                if not kept:
                    raise fitted[0]
                found.append(kept)
            else:
                end = _character_end(full.ids, max_length, tokenizer)
                truncated = Encoded(
                    full.ids[:end], full.trained[:end], truncated=True, left_out=full.left_out
                )
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
    conversation: Conversation, tokenizer: Any, max_length: int, assistant_only: bool
) -> list[Conversation]:
    """Split a conversation between exchanges, greedily into as few parts as possible."""
    messages, tools = conversation.messages, conversation.tools
    system = messages[:1] if messages[0]["role"] == "system" else []
    parts: list[Messages] = []
    for exchange in _exchanges(messages):
        longer = [*(parts[-1] if parts else system), *exchange]
        ids, _ = encode_conversation(longer, tokenizer, assistant_only, tools)
        if parts and len(ids) <= max_length:
            parts[-1] = longer
        else:
            parts.append([*system, *exchange])
    return [conversation.with_messages(part) for part in parts]
