"""Replies in OpenAI's form that a tiny model does not give by itself: tool calls."""

import json

import pytest

from hfsft.serve.engine import Piece, Sampling
from hfsft.serve.parameters import Asked, found_tool_calls
from hfsft.serve.replies import Reply

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, {"y": "}"}]}}\n</tool_call>'


TOOLS = {"f": {"type": "object", "properties": {"x": {"type": "array"}}}}
OTHER = '{"name": "g", "arguments": {"x": 1}}'
DESCRIPTION = json.dumps({"name": "f", "parameters": TOOLS["f"]})


def reply(is_streamed: bool, has_tools: bool = True) -> Reply:
    tools = TOOLS if has_tools else {}
    asked = Asked("m", [[1, 2, 3]], Sampling(9), 1, is_streamed, False, tools)
    return Reply(asked, None, is_chat=True)


@pytest.mark.parametrize(
    ("text", "rest", "names"),
    [
        (f"Let me see.\n{CALL}", "Let me see.", ["f"]),
        (f"{CALL}\n{CALL}", "", ["f", "f"]),
        ("<tool_call>{broken</tool_call> ", "<tool_call>{broken</tool_call> ", []),
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
        (" no call ", " no call ", []),
        (OTHER, OTHER, []),  # of a tool that the request does not have
        (f"I know {DESCRIPTION}", f"I know {DESCRIPTION}", []),
        (f"{OTHER} {CALL}", OTHER, ["f"]),
    ],
)
def test_tool_calls_are_found(text, rest, names):
    found, calls = found_tool_calls(text, TOOLS)
    assert found == rest and [call["name"] for call in calls] == names
    assert {call["arguments"] for call in calls} <= {'{"x": [1, {"y": "}"}]}'}


def test_a_tool_without_parameters_is_called_with_none():
    assert found_tool_calls('{"name": "f", "parameters": {}}', {"f": {}})[1][0]["name"] == "f"


def test_a_whole_reply_with_a_tool_call():
    made = reply(is_streamed=False)
    made.add(0, Piece("I call ", 2))
    made.add(0, Piece(CALL, 9, finish="stop"))
    (choice,) = made.body()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I call"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert made.usage() == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


def test_a_streamed_reply_with_a_tool_call_comes_at_its_end():
    made = reply(is_streamed=True)
    sent = b""
    for piece in (Piece("<tool_", 1), Piece(CALL.removeprefix("<tool_"), 9, finish="stop")):
        made.add(0, piece)
        sent += made.events(0, piece)
    first, second, end = sent.decode().split("\n\n")
    (call,) = json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["tool_calls"]
    assert (call["index"], call["function"]["name"]) == (0, "f")
    last = json.loads(second.removeprefix("data: "))["choices"][0]
    assert last["finish_reason"] == "tool_calls" and end == ""


def test_without_tools_the_text_stays_as_it_is():
    made = reply(is_streamed=False, has_tools=False)
    made.add(0, Piece(CALL, 9, finish="stop"))
    assert made.body()["choices"][0]["message"]["content"] == CALL
