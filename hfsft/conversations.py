"""Any row format → `messages`; `messages` → token ids with the trained ones marked.

A message is `{"role": ..., "content": ...}`. An assistant's content may be a list of parts as in
karpathy/nanochat: `{"type": "text" | "python" | "python_output", "text": ...}`.
"""

import re
from collections.abc import Callable
from typing import Any

from hfsft import templates
from hfsft.errors import DataError

Messages = list[dict[str, Any]]
IGNORED = -100  # the label of a token that is not trained on, in torch and transformers
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class TooLong(Exception):
    """A conversation above `max_length` where `on_too_long` is error."""


class BadRow(Exception):
    """A row that cannot be trained on; its text is the reason, in the audit's words."""


# --- formats ---


def from_messages(row: dict[str, Any]) -> Messages:
    """A list of messages under `messages`."""
    return row["messages"]


def from_sharegpt(row: dict[str, Any]) -> Messages:
    """ShareGPT: `conversations` of `from` and `value`, with an optional `system`."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRow("no messages")
    messages = [
        {
            "role": turn.get("from", turn.get("role")),
            "content": turn.get("value", turn.get("content")),
        }
        if isinstance(turn, dict)
        else turn
        for turn in turns
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def from_prompt_completion(row: dict[str, Any]) -> Messages:
    """`prompt` and `completion`, each a text or a list of messages."""
    prompt, completion = row["prompt"], row["completion"]
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
    elif not isinstance(choices, list):  # a CSV holds the list as one text
        raise BadRow("choices that are no list")
    else:
        texts, labels = choices, [chr(ord("A") + index) for index in range(len(choices))]
        answer = row["answer"]
        answer = labels[answer] if isinstance(answer, int) and 0 <= answer < len(labels) else answer
    if answer not in labels:
        raise BadRow("the answer is none of the choices")
    if not row["question"] or any(text in (None, "") for text in texts):
        raise BadRow("empty content")
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


def detect_format(columns: list[str], source: str) -> str:
    """The format that a source's columns tell.

    Raises:
        DataError: listing the columns and the formats known.
    """
    for name, (needed, _) in FORMATS.items():
        if set(needed) <= set(columns):
            return name
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
        if row.get(column):
            raise BadRow(f"brings its own {column}")
    try:
        messages = FORMATS[name][1](row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRow(f"not a row of format {name}") from None
    return check_messages(messages)


def check_messages(messages: Any) -> Messages:
    """Check roles, their order and contents; returns the messages with canonical role names.

    Raises:
        BadRow: with the reason.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages")
    checked: Messages = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message that is not a mapping")
        role = message.get("role")
        role = ROLES.get(role, role) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant"):
            raise BadRow("unknown role")
        checked.append({"role": role, "content": _check_content(message.get("content"), role)})
    turns = checked[1:] if checked[0]["role"] == "system" else checked
    for index, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise BadRow("roles out of order")
    if len(turns) < 2:
        raise BadRow("no assistant turn")
    return checked


def _check_content(content: Any, role: str) -> Any:
    if isinstance(content, list):
        if all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        elif role != "assistant" or not all(
            isinstance(part, dict)
            and part.get("type") in ("text", "python", "python_output")
            and isinstance(part.get("text"), str)
            for part in content
        ):
            raise BadRow("content that is not text")
    if isinstance(content, list):
        text = "".join(part["text"] for part in content)
    elif isinstance(content, str):
        text = content
    else:
        raise BadRow("content that is not text" if content is not None else "empty content")
    if not text.strip():
        raise BadRow("empty content")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode") from None
    return content


# --- encoding ---

# a piece of a rendered conversation: its text, whether a special token's, and whether trained
Piece = tuple[str, bool, bool]


def nanochat_pieces(messages: Messages) -> list[Piece]:
    """Render messages as chat_templates/nanochat.jinja does: (text, is special, is trained)."""
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    pieces: list[Piece] = [("<|bos|>", True, False)]
    for message in messages[1:] if system else messages:
        content = message["content"]
        if message["role"] == "user":
            pieces += [
                ("<|user_start|>", True, False),
                (system + content, False, False),
                ("<|user_end|>", True, False),
            ]
            system = ""
            continue
        pieces.append(("<|assistant_start|>", True, False))
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            trained = part["type"] != "python_output"
            marks = {"python": "python", "python_output": "output"}.get(part["type"])
            if marks:
                pieces.append((f"<|{marks}_start|>", True, trained))
            pieces.append((part["text"], False, trained))
            if marks:
                pieces.append((f"<|{marks}_end|>", True, trained))
        pieces.append(("<|assistant_end|>", True, True))
    return pieces


def chatml_pieces(messages: Messages) -> list[Piece]:
    """Render messages as chat_templates/chatml.jinja does: (text, is special, is trained).

    What follows "assistant\\n" is encoded apart from it, as a chat's prompt ends there.
    """
    pieces: list[Piece] = []
    for message in messages:
        content, role = _text_alone(message["content"]), message["role"]
        pieces.append(("<|im_start|>", True, False))
        if role == "assistant":
            pieces += [("assistant\n", False, False), (content, False, True)]
        else:
            pieces.append((f"{role}\n{content}", False, False))
        pieces += [("<|im_end|>", True, role == "assistant"), ("\n", False, False)]
    return pieces


def _text_alone(content: Any) -> str:
    """A content without its tool calls and their results, for templates that cannot tell them."""
    if isinstance(content, str):
        return content
    text = "".join(part["text"] for part in content if part["type"] == "text")
    if not text.strip():
        raise BadRow("tool calls alone, which the chat template cannot write")
    return text


def encode_conversation(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[list[int], list[int]]:
    """Encode a conversation; a special token written inside a message is never read as one.

    Args:
        messages: as `check_messages` returns them.
        tokenizer: as `load_tokenizer` returns it.
        assistant_only: train on the assistant's tokens and its end-of-turn token alone; otherwise
            on every token but the results of tool calls.

    Returns:
        Token ids and labels of the same length; untrained labels are -100.

    Raises:
        BadRow: where the template cannot write the conversation.
    """
    pieces_of = {"nanochat": nanochat_pieces, "chatml": chatml_pieces}.get(tokenizer.hfsft_template)
    if pieces_of is None:
        plain = [message | {"content": _text_alone(message["content"])} for message in messages]
        try:
            ids, mask = templates.encode(plain, tokenizer)
        except templates.TemplateError as error:
            raise BadRow(str(error)) from None
        trained = (mine or not assistant_only for mine in mask)
        return ids, [i if t else IGNORED for i, t in zip(ids, trained, strict=True)]
    ids, labels, output = [], [], False
    for text, special, trained in pieces_of(messages):
        piece = (
            [tokenizer.convert_tokens_to_ids(text)]
            if special
            else tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )
        output = output or (text == "<|output_start|>" and special)
        trained = trained or (not assistant_only and not output)
        output = output and not (text == "<|output_end|>" and special)
        ids += piece
        labels += piece if trained else [IGNORED] * len(piece)
    return ids, labels


def fit_conversation(
    messages: Messages,
    tokenizer: Any,
    max_length: int | None,
    on_too_long: str = "truncate",
    assistant_only: bool = True,
) -> list[tuple[list[int], list[int], bool]]:
    """Encode a conversation into at most `max_length` tokens, as `on_too_long` says.

    Args:
        messages: as `check_messages` returns them.
        tokenizer: as `load_tokenizer` returns it.
        max_length: tokens; None: as long as it is.
        on_too_long: "truncate" keeps the beginning and cuts no character in two; "drop" refuses it;
            "split" makes several of it, each with the system message and whole exchanges, and
            truncates an exchange that is too long by itself; "error" raises `TooLong`.
        assistant_only: as `encode_conversation`.

    Returns:
        Token ids, labels, and whether they were cut; several only where it was split.

    Raises:
        BadRow: with the reason, also where no trained token is left.
        TooLong: see `on_too_long`.
    """
    ids, labels = encode_conversation(messages, tokenizer, assistant_only)
    if max_length is None or len(ids) <= max_length:
        return [(ids, _trained(labels), False)]
    if on_too_long == "error":
        raise TooLong
    if on_too_long == "drop":
        raise BadRow("longer than max_length")
    if on_too_long == "split" and len(messages) > 3:
        fitted = []
        for part in _split(messages, tokenizer, max_length, assistant_only):
            fitted += fit_conversation(part, tokenizer, max_length, "truncate", assistant_only)
        return fitted
    end = _character_end(ids, max_length, tokenizer)
    return [(ids[:end], _trained(labels[:end]), True)]


def _trained(labels: list[int]) -> list[int]:
    # the first token is predicted by none before it
    if all(label == IGNORED for label in labels[1:]):
        raise BadRow("nothing left to train on")
    return labels


def _character_end(ids: list[int], end: int, tokenizer: Any) -> int:
    """The last position up to `end` that cuts no character: one takes at most four byte tokens."""
    for position in range(end, max(end - 4, 0), -1):
        if not tokenizer.decode(ids[max(0, position - 8) : position]).endswith("\ufffd"):
            return position
    return end  # the text itself holds replacement characters


def _split(
    messages: Messages, tokenizer: Any, max_length: int, assistant_only: bool
) -> list[Messages]:
    """Cut a conversation between exchanges, as few times as its exchanges in order allow."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    parts: list[Messages] = []
    for start in range(0, len(turns), 2):
        exchange = turns[start : start + 2]
        longer = [*(parts[-1] if parts else system), *exchange]
        fits = len(encode_conversation(longer, tokenizer, assistant_only)[0]) <= max_length
        if parts and fits:
            parts[-1] = longer
        else:
            parts.append([*system, *exchange])
    return parts
