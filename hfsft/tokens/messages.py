"""Messages in one canonical form, which everything after a row's format relies on.

A message has `role`, `content` (text; an assistant's may be a list of nanochat's parts), and where
the row has them `reasoning_content`, `tool_calls`, `tool_call_id`, `name` and `train`: False, the
spans of characters to train on, or True in a message that is not trained on by default.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hfsft.tokens.training_flags import (
    RANGES,
    SPELLINGS,
    BadRow,
    check_lookalikes,
    is_blank,
    is_trained,
    trained_spans,
)

Messages = list[dict[str, Any]]

ROLES = {  # of ShareGPT and others
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # whose content is a call as JSON, or a list of them

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields, and types of parts
CALLS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")
TEXT = ("text", "value", "content")  # where a part has its text

USED = {"role", "content", "from", "value", *REASONING, *CALLS, *SPELLINGS, *RANGES}
# fields that say nothing to a model
HARMLESS = {
    *("id", "index", "refusal", "annotations", "audio"),
    *("created", "timestamp", "cache_control"),
}


@dataclass(frozen=True)
class Conversation:
    """A row as it is encoded."""

    messages: Messages
    tools: list[dict[str, Any]] = field(default_factory=list)  # in OpenAI's form
    unused: tuple[str, ...] = ()  # what the row has and nothing reads

    def with_messages(self, messages: Messages) -> "Conversation":
        """A conversation with other messages and the same tools."""
        return Conversation(messages, self.tools)


# --- a conversation ---


def check_messages(messages: Any, unused: set[str] | None = None) -> Messages:
    """Check roles, their order and contents, and return the messages in canonical form.

    System messages at the beginning are joined with a blank line; a later one is kept between
    exchanges, and it is up to the chat template. A call that is a message of its own joins the
    assistant's before it. A tool call's arguments become a mapping.

    Args:
        messages: as a row has them.
        unused: names of fields that nothing reads are added to it.

    Raises:
        BadRow: with the reason.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages")
    unused = set() if unused is None else unused
    checked: Messages = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message that is not a mapping")
        is_call = message.get("role") in CALL_ROLES
        message = _check_message(message, unused)
        if message["role"] == "system" and [m["role"] for m in checked] == ["system"]:
            checked[0] = _joined(checked[0], message)
        elif is_call and checked and checked[-1]["role"] == "assistant":
            if checked[-1].get("train") != message.get("train"):
                raise BadRow("a tool call and its message, of which only one is to be trained on")
            checked[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            checked.append(message)
    _check_order(checked)
    return checked


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two system messages as one; trained on only if both are."""
    flags = [message.get("train") for message in (first, second)]
    joined = {"role": "system", "content": f"{first['content']}\n\n{second['content']}"}
    if flags == [None, None]:
        return joined
    return joined | {"train": all(flag is True for flag in flags)}


def _check_message(message: dict[str, Any], unused: set[str]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRow("unknown role")
    of_tool = {"tool_call_id", "name"} if ROLES.get(role, role) == "tool" else set()
    known = USED | HARMLESS | of_tool
    check_lookalikes(message, known)
    unused |= {
        f"field {name}"
        for name, value in message.items()
        if name not in known and not is_blank(value)
    }
    if role in CALL_ROLES:
        checked = {"role": "assistant", "content": "", "tool_calls": check_calls(_as_json(content))}
        return checked | _training(message, "assistant", "", None)
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant", "tool"):
        raise BadRow("unknown role")
    return _checked(message, role, content)


def _checked(message: dict[str, Any], role: str, content: Any) -> dict[str, Any]:
    """A message of a known role in canonical form."""
    more: dict[str, Any] = {}
    spans = None
    if isinstance(content, list):
        content, more, spans = _check_parts(content, role)
    calls = more.pop("tool_calls", [])
    if role == "assistant":
        calls = [call for name in CALLS for call in _given_calls(message, name)] + calls
        reasoning = [message[name] for name in REASONING if not is_blank(message.get(name))]
        if reasoning:
            more = {"reasoning_content": _check_text(reasoning[0])}
    if role == "tool":
        more |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
    blank = not content or (isinstance(content, str) and not content.strip())
    content = "" if calls and blank else _check_content(content, role)
    checked = {"role": role, "content": content} | more
    if calls:
        checked["tool_calls"] = calls
    return checked | _training(message, role, content, spans)


def _training(
    message: dict[str, Any], role: str, content: Any, spans: list[list[int]] | None
) -> dict[str, Any]:
    """What a message says about training, where it is not the default: its `train`."""
    flag = is_trained(message)
    if spans is None:
        spans = trained_spans(message, content if isinstance(content, str) else "")
    if flag is False or spans == []:
        return {"train": False}
    if spans is not None:
        if not isinstance(content, str):
            raise BadRow("ranges to train on, beside python parts")
        return {"train": [list(span) for span in spans]}
    return {"train": True} if flag and role != "assistant" else {}


# --- contents ---


def _check_parts(parts: list[Any], role: str) -> tuple[Any, dict[str, Any], list[list[int]] | None]:
    """A content of parts: its text or nanochat's parts, reasoning and calls, and trained spans."""
    kept: list[dict[str, str]] = []
    reasoning, calls, flags = [], [], []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRow("content that is not text")
        check_lookalikes(part, USED)
        kind = part["type"]
        if kind in TEXT_PARTS:
            kept.append({"type": "text", "text": _part_text(part)})
            flags.append(is_trained(part))
        elif role == "assistant" and kind in ("python", "python_output"):
            kept.append({"type": kind, "text": _part_text(part)})
            flags.append(None)
        elif role == "assistant" and kind in REASONING:
            reasoning.append(_part_text(part))
        elif role == "assistant" and kind == "tool_call":
            calls += check_calls(_as_json(_part_text(part)))
        else:
            raise BadRow("content that is not text")
    more: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if reasoning:
        more["reasoning_content"] = _check_text("".join(reasoning))
    spans = None if flags.count(None) == len(flags) else list(_part_spans(kept, flags))
    if all(part["type"] == "text" for part in kept):
        return "".join(part["text"] for part in kept), more, spans
    if spans is not None:
        raise BadRow("ranges to train on, beside python parts")
    return kept, more, None


def _part_spans(parts: list[dict[str, str]], flags: list[bool | None]) -> Iterator[list[int]]:
    """The characters of the parts that are trained on: those that do not say no, as in axolotl."""
    start = 0
    for part, flag in zip(parts, flags, strict=True):
        end = start + len(part["text"])
        if flag is not False and end > start:
            yield [start, end]
        start = end


def _part_text(part: dict[str, Any]) -> str:
    """A part's text, under `text`, LLaMA-Factory's `value`, or the name of its type."""
    for name in (*TEXT, part["type"]):
        if isinstance(part.get(name), str):
            return part[name]
        if isinstance(part.get(name), list):  # Mistral's thinking is a list of text parts
            return "".join(_part_text(one) for one in part[name])
    raise BadRow("content that is not text")


def _check_content(content: Any, role: str) -> Any:
    if isinstance(content, list):
        text = "".join(part["text"] for part in content)
    elif isinstance(content, str):
        text = content
    else:
        raise BadRow("content that is not text" if content is not None else "empty content")
    if (not text or text.isspace()) and role != "tool":  # a tool may return nothing
        raise BadRow("empty content")
    _check_text(text)
    return content


def _check_text(text: Any) -> str:
    if not isinstance(text, str):
        raise BadRow("content that is not text")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode") from None
    return text


# --- tool calls ---


def _as_json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise BadRow("a tool call that is not JSON") from None


def _given_calls(message: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A message's `tool_calls`, or the one call of the older `function_call`."""
    given = message.get(name)
    if is_blank(given):
        return []
    return check_calls(_as_json(given))


def check_calls(calls: Any) -> list[dict[str, Any]]:
    """Check tool calls, and return them in OpenAI's form with arguments as mappings.

    Args:
        calls: one or a list of them, each with a `function` or, without one, its fields.

    Raises:
        BadRow: with the reason.
    """
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRow("a tool call without a name")
        arguments = function.get("arguments") or function.get("parameters") or {}
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
    if not checked:
        raise BadRow("a tool call without a name")
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Check the descriptions of tools, and return them in OpenAI's form.

    Args:
        tools: a list or JSON of one, each `{"type": "function", "function": {"name": ...}}`, or the
            function alone.

    Raises:
        BadRow: with the reason.
    """
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        tools = tools if isinstance(tools, list) else [tools]
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        json.dumps(tools, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode") from None
    except (ValueError, TypeError, RecursionError):
        raise BadRow("tools that are not JSON") from None
    checked = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("a tool without a name")
        wrapped = isinstance(tool.get("function"), dict)
        checked.append(tool if wrapped else {"type": "function", "function": tool})
    return checked


def with_new_ids(messages: Messages) -> Messages:
    """Messages with new ids of nine letters and digits in calls, and the same in their results."""
    made, open_ids, names = [], [], {}
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = []
            for number, call in enumerate(message["tool_calls"]):
                told = json.dumps([index, number, call["function"]])
                name = hashlib.blake2b(told.encode()).hexdigest()[:9]
                if "id" in call:
                    names[call["id"]] = name
                open_ids.append(name)
                calls.append(call | {"id": name})
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool":
            name = names.get(message.get("tool_call_id")) or open_ids[0]
            name = name if name in open_ids else open_ids[0]
            open_ids.remove(name)
            message = message | {"tool_call_id": name}
        made.append(message)
    return made


# --- order ---

# the last turn → the roles that may follow it
FOLLOWS = {
    "nothing": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


def _check_order(messages: Messages) -> None:
    last, calls, has_ids = "nothing", 0, False
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
        # without ids, as in LLaMA-Factory, one result may be that of several calls
        if last == "tool" and role == "assistant" and calls and has_ids:
            raise BadRow("a tool call without its result")
        if role == "tool":
            calls -= 1
            if calls < 0:
                raise BadRow("more tool results than calls")
        last = role
        if message.get("tool_calls"):
            last, calls = "calls", len(message["tool_calls"])
            has_ids = all("id" in call for call in message["tool_calls"])
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no assistant turn")
    if last == "tool" or messages[-1]["role"] == "system":
        raise BadRow("roles out of order")


# --- equality ---


def content_digest(conversation: Conversation) -> str:
    """A digest that is equal for equal conversations, whatever ids their tool calls have."""
    content = [
        {name: held for name, held in message.items() if name not in ("tool_call_id", "name")}
        | {"tool_calls": [call["function"] for call in message.get("tool_calls", ())]}
        for message in conversation.messages
    ]
    text = json.dumps([content, conversation.tools], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
