"""Rows of any known format to `messages`, checked and in one canonical form.

`FORMATS` lists the formats, the columns that identify each, and its reader; `to_messages` reads a
row. A row that cannot be trained on raises `BadRow` with a reason that the audit counts.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from hfsft.errors import DataError

Messages = list[dict[str, Any]]

ROLES = {  # of ShareGPT and others
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}

EMPTY_JSON = ("", "[]", "{}", "null")  # a column that exists but is empty
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class BadRow(Exception):
    """A row that cannot be trained on; its message is the reason that the audit shows."""


# --- one reader per format ---


def from_messages(row: dict[str, Any]) -> Messages:
    """A list of messages under `messages`."""
    return row["messages"]


def from_sharegpt(row: dict[str, Any]) -> Messages:
    """ShareGPT: `conversations` of `from` and `value`, with an optional `system`.

    LLaMA-Factory's `function_call` (JSON of one call or a list of them) and `observation` become
    tool calls and tool results.
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
    """Prompt and completion: `prompt` and `completion`, each a text or a list of messages."""
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

    The letter follows its choice, as in karpathy/nanochat: a small model associates them better so.
    """
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels, answer = choices["text"], choices["label"], row["answerKey"]
    else:
        texts, labels, answer = choices, None, row["answer"]
    if not isinstance(texts, list):  # in a CSV the list is one text
        raise BadRow("choices that are not a list")
    if labels is None:
        labels = [chr(ord("A") + index) for index in range(len(texts))]
        if type(answer) is int and 0 <= answer < len(labels):
            answer = labels[answer]
    contents = [row["question"], *texts, *labels]
    if any(content in (None, "") for content in contents):
        raise BadRow("empty content")
    if isinstance(answer, bool) or any(type(one) not in (str, int, float) for one in contents):
        raise BadRow("content that is not text")
    if answer not in labels:
        raise BadRow("the answer is not among the choices")
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
    """GSM8K: `question` and `answer`, whose `<<48/2=24>>` marks become python parts and outputs."""
    parts = []
    for text in re.split(r"(<<[^>]*>>)", row["answer"]):
        if text.startswith("<<"):
            expression, equals, result = text[2:-2].rpartition("=")
            if not equals:
                raise BadRow("a calculation without a result")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif text:
            parts.append({"type": "text", "text": text})
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": parts},
    ]


# format → the columns that identify it, and its reader; the first with all its columns wins
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Messages]]] = {
    "messages": (("messages",), from_messages),
    "sharegpt": (("conversations",), from_sharegpt),
    "prompt_completion": (("prompt", "completion"), from_prompt_completion),
    "alpaca": (("instruction", "output"), from_alpaca),
    "multiple_choice": (("question", "choices"), from_multiple_choice),
    "gsm8k": (("question", "answer"), from_gsm8k),
}


# --- choosing and applying one ---


def known_format(columns: list[str]) -> str | None:
    """The format that the columns identify, or None."""
    formats = (name for name, (needed, _) in FORMATS.items() if set(needed) <= set(columns))
    return next(formats, None)


def detect_format(columns: list[str], source: str) -> str:
    """The format that a source's columns identify.

    Args:
        columns: their names.
        source: the source's name, for the error.

    Raises:
        DataError: if there is none; it lists the columns and the known formats.
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
    """Read a row as messages and check that they form a conversation.

    Args:
        row: its columns.
        name: a key of `FORMATS`.

    Raises:
        BadRow: with the reason.
    """
    for column in ("chat_template", "chat_template_kwargs", "tools"):
        value = row.get(column)
        if value and not (isinstance(value, str) and value.strip() in EMPTY_JSON):
            raise BadRow(f"has its own {column}")
    if any(row.get(column) for column in MEDIA):
        raise BadRow("has images, video or audio")
    # next to `messages` they repeat the same row, as in ultrafeedback_binarized
    if name != "messages" and row.get("chosen") and row.get("rejected"):
        raise BadRow("a preference row (chosen and rejected)")
    # KTO's; in a CSV it is text
    if name == "prompt_completion" and str(row.get("label")).lower() == "false":
        raise BadRow("an undesirable answer (label: false)")
    try:
        messages = FORMATS[name][1](row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRow(f"not a row of format {name}") from None
    return check_messages(messages)


# --- checking messages ---


def check_messages(messages: Any) -> Messages:
    """Check roles, their order and contents, and return the messages in canonical form.

    System messages at the beginning are joined with a blank line; a later one is kept between
    exchanges, and it is up to the chat template. A tool call's arguments become a mapping.

    Args:
        messages: as a row has them.

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
            raise BadRow("tool call arguments that are not a mapping")
        function = {"name": name, "arguments": arguments}
        call_id = {"id": call["id"]} if call.get("id") else {}
        checked.append(call_id | {"type": "function", "function": function})
    return checked


# the last turn → the roles that may follow it
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
    if (not text or text.isspace()) and role != "tool":  # a tool may return nothing
        raise BadRow("empty content")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode") from None
    return content


def content_digest(messages: Messages) -> str:
    """A digest that is equal for equal conversations, whatever ids their tool calls have.

    Args:
        messages: as `check_messages` returns them.
    """
    content = [
        [message["role"], message["content"], [c["function"] for c in message["tool_calls"]]]
        if "tool_calls" in message
        else [message["role"], message["content"]]
        for message in messages
    ]
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
