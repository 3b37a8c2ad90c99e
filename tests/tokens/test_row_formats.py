"""Rows of every known format are read as messages, and others refused with the reason."""

import json

import pytest
from chat_messages import HELLO, assistant, call, calling, system, tool, user

from hfsft.errors import DataError
from hfsft.recipe.schema import FORMATS as RECIPE_FORMATS
from hfsft.tokens.messages import Conversation, content_digest
from hfsft.tokens.row_formats import (
    FORMATS,
    BadRow,
    detect_format,
    read_row,
)

MULTIPLE_CHOICE = (
    "Multiple Choice question: Which is a fruit?\n"
    "- Stone=A\n"
    "- Apple=B\n"
    "- Chair=C\n"
    "\n"
    "Respond only with the letter of the correct answer."
)
GSM8K = (
    "In May she sold 48/2 = <<48/2=24>>24 clips.\n"
    "In all <<48+24=72>>72.\n"
    "#### 72"
)  # fmt: skip
READ = {
    "messages": (
        "messages",
        {"messages": [system("Be kind."), *HELLO, user("And?"), assistant("Fine.")]},
        [system("Be kind."), *HELLO, user("And?"), assistant("Fine.")],
    ),
    "messages of text parts": (
        "messages",
        {"messages": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
                      assistant([{"type": "text", "text": "Hello"}])]},
        HELLO,
    ),
    "messages with other roles' names": (
        "messages",
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Hello"}]},
        HELLO,
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
         "system": "Be kind."},
        [system("Be kind."), *HELLO],
    ),
    "sharegpt with role and content": (
        "sharegpt",
        {"conversations": [*HELLO], "system": None},
        HELLO,
    ),
    "prompt and completion as text": (
        "prompt_completion",
        {"prompt": "Hi", "completion": " Hello\n"},
        HELLO,
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": [system("Be kind."), user("Hi")], "completion": [assistant("Hello")]},
        [system("Be kind."), *HELLO],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Greet.", "input": "Hi", "output": "Hello", "system": "Be kind."},
        [system("Be kind."), user("Greet.\n\nHi"), assistant("Hello")],
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Hello"},
        HELLO,
    ),
    "multiple choice as in ARC": (
        "multiple_choice",
        {"question": "Which is a fruit?",
         "choices": {"text": ["Stone", "Apple", "Chair"], "label": ["A", "B", "C"]},
         "answerKey": "B"},
        [user(MULTIPLE_CHOICE), assistant("B")],
    ),
    "multiple choice as in MMLU": (
        "multiple_choice",
        {"question": "Which is a fruit?", "subject": "food",
         "choices": ["Stone", "Apple", "Chair"], "answer": 1},
        [user(MULTIPLE_CHOICE), assistant("B")],
    ),
    "gsm8k": (
        "gsm8k",
        {"question": "How many?", "answer": GSM8K},
        [
            user("How many?"),
            assistant([
                {"type": "text", "text": "In May she sold 48/2 = "},
                {"type": "python", "text": "48/2"},
                {"type": "python_output", "text": "24"},
                {"type": "text", "text": "24 clips.\nIn all "},
                {"type": "python", "text": "48+24"},
                {"type": "python_output", "text": "72"},
                {"type": "text", "text": "72.\n#### 72"},
            ]),
        ],
    ),
    "messages with several system turns at the beginning": (
        "messages",
        {"messages": [system("Be kind."), system("Be brief."), *HELLO, system("Now be rude."),
                      *HELLO], "tools": None},
        [system("Be kind.\n\nBe brief."), *HELLO, system("Now be rude."), *HELLO],
    ),
    "messages with tool calls": (
        "messages",
        {"messages": [
            user("Add 1 and 2, and 3 and 4."),
            calling(call("add", '{"a": 1, "b": 2}', id="x"), call("add", {"a": 3, "b": 4}, id="y"),
                    content=None),
            tool("3", tool_call_id="x"),
            tool("", tool_call_id="y", name=None),
            {"role": "assistant", "content": "3 and nothing.", "tool_calls": None},
            user("And?"),
            calling({"function": {"name": "stop", "arguments": ""}}, content=" \n"),
        ], "tools": "[]"},
        [
            user("Add 1 and 2, and 3 and 4."),
            calling(call("add", {"a": 1, "b": 2}, id="x"), call("add", {"a": 3, "b": 4}, id="y")),
            tool("3", tool_call_id="x"),
            tool("", tool_call_id="y"),
            assistant("3 and nothing."),
            user("And?"),
            calling(call("stop", {})),
        ],
    ),
    "sharegpt with tool calls": (
        "sharegpt",
        {"conversations": [
            {"from": "human", "value": "Add 1 and 2."},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ], "tools": ""},
        [user("Add 1 and 2."), calling(call("add", {"a": 1, "b": 2})), tool("3"),
         assistant("It is 3.")],
    ),
    "messages with a system column": (
        "messages",
        {"messages": HELLO, "system": "Be kind."},
        [system("Be kind."), *HELLO],
    ),
    "prompt and completion with a system column": (
        "prompt_completion",
        {"prompt": "Hi", "completion": "Hello", "system": "Be kind."},
        [system("Be kind."), *HELLO],
    ),
    "alpaca with a history": (
        "alpaca",
        {"instruction": "And?", "output": "Fine.", "history": [["Hi", "Hello"]], "system": "x"},
        [system("x"), *HELLO, user("And?"), assistant("Fine.")],
    ),
    "alpaca with a history in a CSV": (
        "alpaca",
        {"instruction": "And?", "output": "Fine.", "history": '[["Hi", "Hello"]]'},
        [*HELLO, user("And?"), assistant("Fine.")],
    ),
    "messages with the older function_call beside text": (
        "messages",
        {"messages": [
            user("Add."),
            assistant("Let me see.") | {"function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "1"},
            assistant("It is 1."),
        ]},
        [user("Add."), calling(call("add", {"a": 1}), content="Let me see."), tool("1", name="add"),
         assistant("It is 1.")],
    ),
    "messages whose calls are turns of their own": (
        "messages",
        {"messages": [
            user("Add twice."),
            assistant("Let me see."),
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
            {"role": "tool_response", "content": "1"},
            {"role": "tool_response", "content": "2"},
            assistant("1 and 2."),
        ]},
        [user("Add twice."),
         calling(call("add", {"a": 1}), call("add", {"a": 2}), content="Let me see."),
         tool("1"), tool("2"), assistant("1 and 2.")],
    ),
    "LLaMA-Factory's parts": (
        "messages",
        {"messages": [
            system([{"type": "text", "value": "Be kind."}]),
            user([{"type": "text", "value": "Add."}]),
            assistant([{"type": "reasoning", "value": "Hm."},
                       {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                       {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'}]),
            tool([{"type": "text", "value": "1"}]),
            assistant([{"type": "thinking", "thinking": "Oh."}, {"type": "text", "value": "1."}]),
        ]},
        [system("Be kind."), user("Add."),
         calling(call("add", {"a": 1}), call("add", {"a": 2})) | {"reasoning_content": "Hm."},
         tool("1"), assistant("1.") | {"reasoning_content": "Oh."}],
    ),
    "reasoning in a field": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "Hello", "thinking": "A greeting."}]},
        [user("Hi"), assistant("Hello") | {"reasoning_content": "A greeting."}],
    ),
    "gsm8k without a calculation": (
        "gsm8k",
        {"question": "Hi", "answer": "Hello"},
        HELLO,
    ),
    "a question and an answer in C++": (
        "gsm8k",
        {"question": "Hi", "answer": "cout << x=1; y >> 2; <<5>> <<a=b>> 1<<2 = 4, 8>>1"},
        [user("Hi"), assistant("cout << x=1; y >> 2; <<5>> <<a=b>> 1<<2 = 4, 8>>1")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_format_is_detected_and_read(case):
    name, row, messages = READ[case]
    assert detect_format(list(row), "x") == name
    assert read_row(row, name).messages == messages


def test_the_recipe_names_every_format():
    assert set(RECIPE_FORMATS) == {*FORMATS, "text"}


def test_undetected_format_lists_columns_and_formats():
    with pytest.raises(DataError) as error:
        detect_format(["chat", "id"], "rows.jsonl")
    assert str(error.value) == (
        "rows.jsonl: cannot tell the format from its columns chat, id\n"
        "  Known: messages (messages); sharegpt (conversations); "
        "prompt_completion (prompt, completion); alpaca (instruction, output); "
        "multiple_choice (question, choices); gsm8k (question, answer). "
        "Rename with `columns: {messages: YOUR_COLUMN}`"
    )
    with pytest.raises(DataError, match=r"columns \(none\)"):
        detect_format([], "rows.jsonl")


IMAGE = [{"type": "image", "url": "x"}]
REFUSED = [
    # rows that are not of their format
    ("messages", {}, "not a row of format messages"),
    ("sharegpt", {"conversations": "Hi"}, "no messages"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, "x"]},
     "a message that is not a mapping"),
    ("prompt_completion", {"prompt": 5, "completion": "Hello"}, "content that is not text"),
    ("alpaca", {"instruction": None, "input": None, "output": "Hello"}, "empty content"),
    ("multiple_choice", {"question": "?", "choices": ["x", "y"], "answer": 2},
     "the answer is not among the choices"),
    ("multiple_choice", {"question": "?", "choices": "['x', 'y']", "answer": 0},
     "choices that are not a list"),
    ("multiple_choice", {"question": None, "choices": ["x", "y"], "answer": 0}, "empty content"),
    ("multiple_choice", {"question": "?", "choices": ["x", None], "answer": 0}, "empty content"),
    ("multiple_choice",
     {"question": "?", "choices": {"text": ["x"], "label": ["A", "B"]}, "answerKey": "A"},
     "not a row of format multiple_choice"),
    ("gsm8k", {"question": "?", "answer": 5}, "not a row of format gsm8k"),
    ("gsm8k", {"question": "?", "answer": ""}, "empty content"),
    # messages that are not a conversation
    ("messages", {"messages": None}, "no messages"),
    ("messages", {"messages": []}, "no messages"),
    ("messages", {"messages": "Hi"}, "no messages"),
    ("messages", {"messages": ["Hi", "Hello"]}, "a message that is not a mapping"),
    ("messages", {"messages": [user("Hi"), {"role": "critic", "content": "5"}]}, "unknown role"),
    ("messages", {"messages": [user("Hi"), {"content": "Hello"}]}, "unknown role"),
    ("messages", {"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown role"),
    ("messages", {"messages": [assistant("Hello"), user("Hi")]}, "roles out of order"),
    ("messages", {"messages": [user("Hi"), user("Hi"), assistant("x")]}, "roles out of order"),
    ("messages", {"messages": [*HELLO, system("Be kind.")]}, "roles out of order"),
    ("messages", {"messages": [user("Hi")]}, "no assistant turn"),
    ("messages", {"messages": [system("Be kind.")]}, "no assistant turn"),
    ("messages", {"messages": [user("Hi"), assistant(None)]}, "empty content"),
    ("messages", {"messages": [user(" \n"), assistant("Hello")]}, "empty content"),
    ("messages", {"messages": [system(""), *HELLO]}, "empty content"),
    ("messages", {"messages": [user("Hi"), assistant([])]}, "empty content"),
    ("messages", {"messages": [user("Hi"), assistant(5)]}, "content that is not text"),
    ("messages", {"messages": [user(IMAGE), assistant("Hello")]}, "content that is not text"),
    ("messages", {"messages": [user("Hi"), assistant(IMAGE)]}, "content that is not text"),
    ("messages", {"messages": [user([{"type": "python", "text": "1"}]), assistant("x")]},
     "content that is not text"),
    ("messages", {"messages": [user("Hi"), assistant([{"type": "python", "text": 1}])]},
     "content that is not text"),
    ("messages", {"messages": [user("Hi"), assistant("a\ud800b")]}, "invalid Unicode"),
    ("messages", {"messages": [user("Hi"), system("Be kind."), system("Be kind.")]},
     "no assistant turn"),
    # tool calls
    ("messages", {"messages": [user("Hi"), tool("5")]}, "a tool result without its call"),
    ("messages", {"messages": [*HELLO, tool("5")]}, "a tool result without its call"),
    ("messages", {"messages": [user("Hi"), calling(call("f", {})), user("Hi")]},
     "a tool call without its result"),
    ("messages", {"messages": [user("Hi"), calling(call("f", {})), system("x"), tool("5")]},
     "a tool call without its result"),
    ("messages",
     {"messages": [user("Hi"), calling(call("f", {}, id="a"), call("g", {}, id="b")),
                   tool("5", tool_call_id="a"), assistant("x")]},
     "a tool call without its result"),
    ("messages", {"messages": [user("Hi"), calling(call("f", {})), tool("5")]},
     "roles out of order"),
    ("messages", {"messages": [user("Hi"), calling(call("f", {})), tool("5"), tool("6")]},
     "more tool results than calls"),
    ("messages", {"messages": [user("Hi"), calling(call("f", "{"))]},
     "tool call arguments that are not JSON"),
    ("messages", {"messages": [user("Hi"), calling(call("f", "[1]"))]},
     "tool call arguments that are not a mapping"),
    ("messages", {"messages": [user("Hi"), calling(call("f", {"a": "\ud800"}))]},
     "invalid Unicode"),
    ("messages", {"messages": [user("Hi"), calling(call(None, {}))]},
     "a tool call without a name"),
    ("messages", {"messages": [user("Hi"), calling("f")]}, "a tool call without a name"),
    ("messages", {"messages": [user("Hi"), calling(call("f", {})), tool({"a": 1})]},
     "content that is not text"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"},
                                    {"from": "function_call", "value": "f(x)"}]},
     "a tool call that is not JSON"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"},
                                    {"from": "function_call", "value": "[]"}]},
     "a tool call without a name"),
    ("messages", {"messages": HELLO, "tools": '[{"name": "f"'}, "tools that are not JSON"),
    ("messages", {"messages": HELLO, "tools": [{"type": "function"}]}, "a tool without a name"),
    ("messages", {"messages": HELLO, "functions": ["f"]}, "tools that are not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), REFUSED)
def test_a_refused_row_has_a_reason(name, row, reason):
    with pytest.raises(BadRow) as error:
        read_row(row, name)
    assert str(error.value) == reason


def test_a_digest_covers_content_but_not_tool_call_ids():
    one = [user("Hi"), calling(call("f", {"a": 1, "b": 2}, id="x")), tool("5", tool_call_id="x")]
    same = [user("Hi"), calling(call("f", {"b": 2, "a": 1}, id="y")), tool("5", tool_call_id="y")]
    assert content_digest(Conversation(one)) == content_digest(Conversation(same))
    others = [
        [user("Hi"), calling(call("f", {"a": 1, "b": 3})), tool("5")],
        [user("Hi"), calling(call("f", {"a": 1, "b": 2})), tool("6")],
        [system("Hi"), *one],
        [user("Hi"), assistant(""), tool("5")],
        [user("Hi"), assistant([{"type": "python", "text": "5"}])],
        [user("Hi"), assistant([{"type": "python_output", "text": "5"}])],
    ]
    assert len({content_digest(Conversation(messages)) for messages in [one, *others]}) == 7


@pytest.mark.parametrize("column", ["chat_template", "chat_template_kwargs"])
def test_a_row_with_its_own_template_is_refused(column):
    with pytest.raises(BadRow, match=f"^has its own {column}$"):
        read_row({"messages": HELLO, column: {"a": 1}}, "messages")


TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [{"type": "function", "function": TOOL}]},
        {"tools": json.dumps([{"type": "function", "function": TOOL}])},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": TOOL},
        {"functions": [TOOL], "tools": "[]"},
    ],
)
def test_tools_in_every_form(columns):
    read = read_row({"messages": HELLO} | columns, "messages")
    assert read.tools == [{"type": "function", "function": TOOL}] and read.unused == ()
    assert content_digest(read) != content_digest(read_row({"messages": HELLO}, "messages"))


def test_what_nothing_reads_is_named():
    row = {
        "messages": [user("Hi") | {"name": "Anna", "id": 5}, assistant("Hello") | {"score": 1}],
        "score": 0.5,
        "label": "sports",
        "id": 7,
        "notes": "",
        "prompt": None,
    }
    names = ("column label", "column score", "field name", "field score")
    assert read_row(row, "messages").unused == names
    row = {"messages": [system("Be kind."), *HELLO], "system": "Be rude."}
    assert read_row(row, "messages").unused == ("column system",)
    row = {"messages": [system("Be kind."), *HELLO], "system": "Be kind."}
    assert read_row(row, "messages").unused == ()
    assert read_row({"instruction": "Hi", "output": "Hello", "text": "x"}, "alpaca").unused == (
        "column text",
    )
