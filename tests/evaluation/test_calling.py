"""The generated tool-calling task: its rows, calls in answers of every template, and grading."""

import copy
import json

import pytest
from rigged import save

from hfsft.errors import ModelError
from hfsft.evaluation.answering import Evaluator
from hfsft.evaluation.calling import (
    TOOLS,
    calling_rows,
    calls_are_right,
    fits_schema,
    split_calls,
)
from hfsft.evaluation.evaluate import evaluate
from hfsft.evaluation.tasks import load_task
from hfsft.tokens.row_formats import read_row

ADD = {"name": "add", "arguments": {"a": 1, "b": "x{"}}


def test_rows_are_seeded_and_can_be_trained_on():
    rows = calling_rows(200)
    assert rows[:20] == calling_rows(20) and rows[:20] != calling_rows(20, seed=1)
    assert {call["name"] for row in rows for call in row["calls"]} == set(TOOLS)
    assert 30 <= sum(len(row["calls"]) == 2 for row in rows) <= 70
    for row in rows:
        assert calls_are_right(json.dumps(row["calls"]), row["calls"], row["tools"])
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "", "tool_calls": row["calls"]},
        ]
        read = read_row({"messages": messages, "tools": row["tools"]}, "messages")
        assert read.tools == row["tools"] and len(read.messages[1]["tool_calls"]) == len(
            row["calls"]
        )


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (f"<tool_call>\n{json.dumps(ADD)}\n</tool_call>", ""),
        (f"Let me see.\n<tool_call>\n{json.dumps(ADD)}\n</tool_call>", "Let me see."),
        (f"Let me see. <<{json.dumps(ADD)}>>", "Let me see."),
        (f"Let me see.{json.dumps(ADD)}", "Let me see."),
        (f"[TOOL_CALLS][{json.dumps(ADD | {'id': 'x'})}]", ""),
        (f"[{json.dumps(ADD | {'id': 'x'})}]", ""),
        (json.dumps({"name": "add", "parameters": ADD["arguments"]}), ""),
        ("{ not JSON {" + json.dumps(ADD) + "}", "{ not JSON {}"),
    ],
)
def test_calls_are_found_in_the_form_of_every_template(text, rest):
    assert split_calls(text) == (rest, [ADD])


def test_several_calls_and_a_call_within_another_object():
    one = json.dumps(ADD)
    text = f"<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{one}\n</tool_call>"
    assert split_calls(text) == ("", [ADD, ADD])
    assert split_calls(f"[{one}, {one}]") == ("", [ADD, ADD])
    assert split_calls(json.dumps({"type": "function", "function": ADD}))[1] == [ADD]


def test_no_call_is_no_call():
    for text in ("", " {} ", '{"name": "add"}', '{"name": 1, "arguments": {}}', "{" * 5000):
        assert split_calls(text) == (text, [])


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "on": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["a", "b"]},
    },
    "required": ["n"],
}


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"n": 1}, True),
        ({"n": 1, "x": 2, "on": True, "unit": "a"}, True),
        ({"n": 1, "x": 2.5}, True),
        ({}, False),
        ({"n": "1"}, False),
        ({"n": True}, False),
        ({"n": 1.5}, False),
        ({"n": 1, "on": 1}, False),
        ({"n": 1, "unit": "c"}, False),
        ({"n": 1, "more": 1}, False),
    ],
)
def test_arguments_are_checked_against_the_schema(arguments, fits):
    assert fits_schema(arguments, SCHEMA) is fits


def test_right_calls_are_all_of_them_in_any_order_and_no_other():
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    one, two = ({"name": "f", "arguments": {"n": n}} for n in (1, 2))

    def graded(*calls) -> bool:
        return calls_are_right(" ".join(map(json.dumps, calls)), [one, two], tools)

    assert graded(one, two) and graded(two, one)
    assert not graded(one) and not graded(one, one) and not graded(one, two, two) and not graded()
    assert not graded(one, {"name": "g", "arguments": {"n": 2}})


def test_the_task_gives_the_tools_to_the_template(make_model, tokenizer, tmp_path):
    folder = save(make_model(), tokenizer, tmp_path / "model")
    task = load_task("tool_calls", folder, rows=3)
    assert len({question.digest for question in task.questions}) == 3
    question = task.questions[0]
    evaluator = Evaluator(folder)
    ids = evaluator.prompt_ids(question.prompt, tools=question.tools)
    text = evaluator.tokenizer.decode(ids)
    assert json.dumps(question.tools[0]["function"]) in text and question.prompt in text
    assert question.is_right(question.answer) and not question.is_right("No.")
    figures = evaluate(folder, ["tool_calls"], rows=3, out=tmp_path)["tasks"]["tool_calls"]
    assert (figures["rows"], figures["right"], figures["chance"]) == (3, 0, 0.0)


def test_a_model_without_a_template_cannot_be_given_tools(make_model, tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    folder = save(make_model(), own, tmp_path / "model")
    with pytest.raises(ModelError, match="is not a chat model, so it cannot be given tools"):
        evaluate(folder, ["tool_calls"], rows=1, out=tmp_path)
