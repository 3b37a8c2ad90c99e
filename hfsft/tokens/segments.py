"""Conversations as segments of text, as hfsft's own two chat templates render them.

In Python rather than Jinja: a segment knows whether its text is a special token, and which of its
characters are trained on.
"""

import json
from typing import Any

from hfsft.tokens.messages import Conversation
from hfsft.tokens.training_flags import BadRow

# whether a text is trained on; None: never, whatever `assistant_only` is, such as a tool's result
Mark = bool | None

# a segment of a rendered conversation: its text, whether it is a special token, and its mark, or
# (characters, mark) for each run of a text that has several
Segment = tuple[str, bool, Mark | list[tuple[int, Mark]]]

CHATML_TOOLS = (  # the words of Qwen2.5's own template
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)


def nanochat_segments(conversation: Conversation) -> list[Segment]:
    """Render a conversation as chat_templates/nanochat.jinja does.

    A tool call is a python part with `{"name": ..., "arguments": ...}`, as nanochat's calculator
    calls are python parts, and ends the turn; its result is a python_output part.

    Args:
        conversation: as `read_row` returns it.

    Raises:
        BadRow: if the template cannot render it.
    """
    segments: list[Segment] = [("<|bos|>", True, False)]
    before: list[tuple[str, Mark]] = []  # system message and tools, in front of the first question
    begun = False
    for message in conversation.messages:
        content, role = message["content"], message["role"]
        mark, end = _marks(message)
        header = None if mark is None else False
        if role == "system":
            if begun:
                raise BadRow("a later system message, which the chat template cannot render")
            before += [*_marked(content, mark), ("\n\n", header)]
        elif role == "user":
            if not begun and conversation.tools:
                lines = [_json(tool.get("function", tool)) for tool in conversation.tools]
                before.append(("\n".join(["Functions that can be called:", *lines, "", ""]), None))
            segments += [
                ("<|user_start|>", True, header),
                _segment([*before, *_marked(content, mark)]),
                ("<|user_end|>", True, end),
            ]
            before = []
        elif role == "tool":
            segments += [
                ("<|output_start|>", True, header),
                _segment(_marked(content, mark)),
                ("<|output_end|>", True, end),
            ]
        else:
            segments += [
                ("<|assistant_start|>", True, header),
                *_assistant_parts(message, mark),
                ("<|assistant_end|>", True, end),
            ]
        begun = begun or role != "system"
    return segments


def _assistant_parts(message: dict[str, Any], mark: Any) -> list[Segment]:
    """The text, python parts and tool calls of an assistant message, in nanochat's form."""
    content, whole = message["content"], None if isinstance(mark, list) else mark
    if isinstance(content, str):
        pieces = [(_thinking(message), whole), *_marked(content, mark)]
        segments = [_segment(pieces)] if any(text for text, _ in pieces) else []
    else:
        segments = [(_thinking(message), False, whole)] if _thinking(message) else []
        for part in content:
            if part["type"] == "text":
                segments.append((part["text"], False, whole))
            elif part["type"] == "python":
                segments += _tool_part("python", part["text"], whole)
            else:
                segments += _tool_part("output", part["text"], None)
    for call in message.get("tool_calls", ()):
        segments += _tool_part("python", _json(call["function"]), whole)
    return segments


def _tool_part(kind: str, text: str, mark: Mark) -> list[Segment]:
    start, end = f"<|{kind}_start|>", f"<|{kind}_end|>"
    return [(start, True, mark), (text, False, mark), (end, True, mark)]


def chatml_segments(conversation: Conversation) -> list[Segment]:
    """Render a conversation as chat_templates/chatml.jinja does.

    Tools, calls and results have the form of Hermes and Qwen2.5: `<tool_call>` with a line of
    `{"name": ..., "arguments": ...}` in the assistant's turn, and each result in a turn of role
    tool between `<tool_response>` lines. System messages may come anywhere. The text after
    "assistant\\n" is a segment of its own, because a chat's prompt ends there.

    Args:
        conversation: as `read_row` returns it.

    Raises:
        BadRow: if the template cannot render it.
    """
    segments: list[Segment] = []
    messages, tools = conversation.messages, ""
    if conversation.tools:
        tools = "\n".join([CHATML_TOOLS[0], *map(_json, conversation.tools)]) + CHATML_TOOLS[1]
        if messages[0]["role"] != "system":
            segments += [
                ("<|im_start|>", True, False),
                _segment([("system\n", False), (tools, None)]),
                ("<|im_end|>", True, False),
                ("\n", False, False),
            ]
    for index, message in enumerate(messages):
        content, role = message["content"], message["role"]
        mark, end = _marks(message)
        header = None if mark is None else False
        segments.append(("<|im_start|>", True, header))
        if role == "assistant":
            segments += [("assistant\n", False, header), _chatml_answer(message, mark)]
        elif role == "tool":
            pieces = [("tool\n<tool_response>\n", header), *_marked(content, mark)]
            segments.append(_segment([*pieces, ("\n</tool_response>", header)]))
        else:
            pieces = [(f"{role}\n", header), *_marked(content, mark)]
            if tools and index == 0 and role == "system":
                pieces += [("\n\n" + tools, None)]
            segments.append(_segment(pieces))
        segments += [("<|im_end|>", True, end), ("\n", False, header)]
    return segments


def _chatml_answer(message: dict[str, Any], mark: Any) -> Segment:
    """The reasoning, text and calls of an assistant message, in ChatML as Hermes and Qwen do."""
    whole = None if isinstance(mark, list) else mark
    text = plain_text(message)
    calls = [
        f"<tool_call>\n{_json(call['function'])}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    written = ("\n" if text and calls else "") + "\n".join(calls)
    return _segment([(_thinking(message), whole), *_marked(text, mark), (written, whole)])


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


def _thinking(message: dict[str, Any]) -> str:
    """An assistant's reasoning as Qwen3 writes it, in front of the answer."""
    reasoning = message.get("reasoning_content")
    return f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""


def _json(value: Any) -> str:
    """As the `tojson` of chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)


# --- marks ---


def _marks(message: dict[str, Any]) -> tuple[Any, Mark]:
    """The mark of a message's content, a list of spans if it names them, and of its end of turn."""
    default = {"assistant": True, "tool": None}.get(message["role"], False)
    said = message.get("train")
    if isinstance(said, list):
        return said, True
    mark = default if said is None else said or None
    return mark, mark


def _marked(text: str, mark: Any) -> list[tuple[str, Mark]]:
    """A text with its mark; cut into pieces if the mark is a list of spans."""
    if not isinstance(mark, list):
        return [(text, mark)]
    pieces, done = [], 0
    for start, end in mark:
        pieces += [(text[done:start], None), (text[start:end], True)]
        done = end
    return [*pieces, (text[done:], None)]


def _segment(pieces: list[tuple[str, Mark]]) -> Segment:
    """Pieces as one segment, which is tokenized as a whole."""
    pieces = [(text, mark) for text, mark in pieces if text] or pieces[:1]
    text = "".join(text for text, _ in pieces)
    if len({mark for _, mark in pieces}) == 1:
        return text, False, pieces[0][1]
    return text, False, [(len(text), mark) for text, mark in pieces]
