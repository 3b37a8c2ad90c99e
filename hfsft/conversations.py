"""Any row format → `messages`; `messages` → token ids with the trained ones marked.

A message is `{"role": ..., "content": ...}`. An assistant's content may be a list of parts as in
karpathy/nanochat: `{"type": "text" | "python" | "python_output", "text": ...}`. Tool calls are
OpenAI's: an assistant's message has `tool_calls`, and each result is a message of role `tool`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfsft import templates
from hfsft.errors import DataError

Messages = list[dict[str, Any]]
IGNORED = -100  # the label of a token that is not trained on, in torch and transformers
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}


class TooLong(Exception):
    """A conversation above `max_length` where `on_too_long` is error."""


EMPTY_JSON = ("", "[]", "{}", "null")  # a column that is there but says nothing
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class BadRow(Exception):
    """A row that cannot be trained on; its text is the reason, in the audit's words."""


# --- formats ---


def from_messages(row: dict[str, Any]) -> Messages:
    """A list of messages under `messages`."""
    return row["messages"]


def from_sharegpt(row: dict[str, Any]) -> Messages:
    """ShareGPT: `conversations` of `from` and `value`, with an optional `system`.

    LLaMA-Factory's `function_call` (JSON of one call or a list) and `observation` are tool turns.
    """
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRow("no messages")
    messages = [_from_sharegpt_turn(turn) if isinstance(turn, dict) else turn for turn in turns]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _from_sharegpt_turn(turn: dict[str, Any]) -> dict[str, Any]:
    role = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    if role != "function_call":
        return turn | {"role": role, "content": content}
    try:
        calls = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        raise BadRow("a tool call that is not JSON") from None
    calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    if not calls:
        raise BadRow("a tool call without a name")
    return {"role": "assistant", "content": "", "tool_calls": calls}


def from_prompt_completion(row: dict[str, Any]) -> Messages:
    """`prompt` and `completion`, each a text or a list of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if prompt is None or completion is None:
        raise BadRow("empty content")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion.strip()}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow("content that is not text")
    return prompt + completion


def from_alpaca(row: dict[str, Any]) -> Messages:
    """Alpaca: `instruction`, an optional `input` and `system`, and `output`."""
    instruction, extra = row["instruction"], row.get("input")
    if not all(isinstance(text, str | None) for text in (instruction, extra, row["output"])):
        raise BadRow("content that is not text")
    question = f"{instruction}\n\n{extra}" if extra and instruction else instruction or extra
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def from_multiple_choice(row: dict[str, Any]) -> Messages:
    """Multiple choice: ARC (`choices: {text, label}`, `answerKey`) or MMLU (`choices`, `answer`).

    The letter follows its choice, as in karpathy/nanochat: a small model binds them better so.
    """
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels, answer = choices["text"], choices["label"], row["answerKey"]
    else:
        texts, labels, answer = choices, None, row["answer"]
    if not isinstance(texts, list):  # a CSV holds the list as one text
        raise BadRow("choices that are no list")
    if labels is None:
        labels = [chr(ord("A") + index) for index in range(len(texts))]
        if type(answer) is int and 0 <= answer < len(labels):
            answer = labels[answer]
    said = [row["question"], *texts, *labels]
    if any(text in (None, "") for text in said):
        raise BadRow("empty content")
    if isinstance(answer, bool) or any(type(text) not in (str, int, float) for text in said):
        raise BadRow("content that is not text")
    if answer not in labels:
        raise BadRow("the answer is none of the choices")
    lines = [f"- {text}={label}" for text, label in zip(texts, labels, strict=True)]
    question = "\n".join(
        [
            f"Multiple Choice question: {row['question']}",
            *lines,
            "",
            "Respond only with the letter of the correct answer.",
        ]
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_gsm8k(row: dict[str, Any]) -> Messages:
    """GSM8K: `question` and `answer`, whose `<<48/2=24>>` marks become tool calls and results."""
    parts = []
    for piece in re.split(r"(<<[^>]*>>)", row["answer"]):
        if piece.startswith("<<"):
            expression, equals, result = piece[2:-2].rpartition("=")
            if not equals:
                raise BadRow("a calculation without a result")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": parts},
    ]


# format → the columns that tell it, and its reader; the first whose columns are all there is taken
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Messages]]] = {
    "messages": (("messages",), from_messages),
    "sharegpt": (("conversations",), from_sharegpt),
    "prompt_completion": (("prompt", "completion"), from_prompt_completion),
    "alpaca": (("instruction", "output"), from_alpaca),
    "multiple_choice": (("question", "choices"), from_multiple_choice),
    "gsm8k": (("question", "answer"), from_gsm8k),
}


def known_format(columns: list[str]) -> str | None:
    """The format that columns tell, if any."""
    formats = (name for name, (needed, _) in FORMATS.items() if set(needed) <= set(columns))
    return next(formats, None)


def detect_format(columns: list[str], source: str) -> str:
    """The format that a source's columns tell.

    Raises:
        DataError: listing the columns and the formats known.
    """
    found = known_format(columns)
    if found is not None:
        return found
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _) in FORMATS.items())
    raise DataError(
        f"{source}: cannot tell the format from its columns {', '.join(columns) or '(none)'}\n"
        f"  Known: {known}. Rename with `columns: {{messages: YOUR_COLUMN}}`"
    )


def to_messages(row: dict[str, Any], name: str) -> Messages:
    """Read a row as messages and check that they make a conversation.

    Raises:
        BadRow: with the reason.
    """
    for column in ("chat_template", "chat_template_kwargs", "tools"):
        brought = row.get(column)
        if brought and not (isinstance(brought, str) and brought.strip() in EMPTY_JSON):
            raise BadRow(f"brings its own {column}")
    if any(row.get(column) for column in MEDIA):
        raise BadRow("has images, video or audio")
    # beside `messages` they are another view of the same row, as in ultrafeedback_binarized
    if name != "messages" and row.get("chosen") and row.get("rejected"):
        raise BadRow("a preference row (chosen and rejected)")
    # KTO's; a CSV holds it as text
    if name == "prompt_completion" and str(row.get("label")).lower() == "false":
        raise BadRow("an answer to avoid (label: false)")
    try:
        messages = FORMATS[name][1](row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRow(f"not a row of format {name}") from None
    return check_messages(messages)


def check_messages(messages: Any) -> Messages:
    """Check roles, their order and contents; returns the messages in canonical form.

    System messages at the beginning become one, with a blank line between them; one further on is
    kept between exchanges, and the chat template decides. A tool call's arguments become a mapping.

    Raises:
        BadRow: with the reason.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages")
    checked: Messages = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message that is not a mapping")
        message = _check_message(message)
        if message["role"] == "system" and [m["role"] for m in checked] == ["system"]:
            checked[0]["content"] += "\n\n" + message["content"]
        else:
            checked.append(message)
    _check_order(checked)
    return checked


def _check_message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    role = ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ("system", "user", "assistant", "tool"):
        raise BadRow("unknown role")
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        blank = not content or (isinstance(content, str) and not content.strip())
        content = "" if blank else _check_content(content, role)
        return {"role": role, "content": content, "tool_calls": _check_calls(calls)}
    if role == "tool":
        names = {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
        return {"role": role, "content": _check_content(content, role)} | names
    return {"role": role, "content": _check_content(content, role)}


def _check_calls(calls: Any) -> list[dict[str, Any]]:
    checked = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRow("a tool call without a name")
        arguments = function.get("arguments") or {}
        try:
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            json.dumps(arguments, ensure_ascii=False).encode()
            name.encode()
        except UnicodeEncodeError:
            raise BadRow("invalid Unicode") from None
        except (ValueError, TypeError, RecursionError):
            raise BadRow("tool call arguments that are not JSON") from None
        if not isinstance(arguments, dict):
            raise BadRow("tool call arguments that are no mapping")
        function = {"name": name, "arguments": arguments}
        number = {"id": call["id"]} if call.get("id") else {}
        checked.append(number | {"type": "function", "function": function})
    return checked


# what came last → the roles that may follow it
FOLLOWS = {
    "nothing": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


def _check_order(messages: Messages) -> None:
    last, calls = "nothing", 0
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and (index == 0 or last in ("user", "assistant")):
            continue
        if role not in FOLLOWS[last]:
            if role == "tool":
                raise BadRow("a tool result without its call")
            raise BadRow(
                "a tool call without its result" if last == "calls" else "roles out of order"
            )
        if role == "tool":
            calls -= 1
            if calls < 0:
                raise BadRow("more tool results than calls")
        last = role
        if message.get("tool_calls"):
            last, calls = "calls", len(message["tool_calls"])
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no assistant turn")
    if last == "tool" or messages[-1]["role"] == "system":
        raise BadRow("roles out of order")


def _check_content(content: Any, role: str) -> Any:
    if isinstance(content, list):
        types = ("text", "python", "python_output") if role == "assistant" else ("text",)
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") not in types
                or not isinstance(part.get("text"), str)
            ):
                raise BadRow("content that is not text")
        text = "".join(part["text"] for part in content)
        if all(part["type"] == "text" for part in content):
            content = text
    elif isinstance(content, str):
        text = content
    else:
        raise BadRow("content that is not text" if content is not None else "empty content")
    if (not text or text.isspace()) and role != "tool":  # a tool may have nothing to say
        raise BadRow("empty content")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode") from None
    return content


def content_digest(messages: Messages) -> str:
    """The same for conversations that say the same, whatever ids their tool calls have.

    Args:
        messages: as `check_messages` returns them.
    """
    said = [
        [message["role"], message["content"], [c["function"] for c in message["tool_calls"]]]
        if "tool_calls" in message
        else [message["role"], message["content"]]
        for message in messages
    ]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


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
