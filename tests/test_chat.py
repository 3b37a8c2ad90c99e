"""A chat with a model that calls tools, whose results a person gives."""

import copy
import json
import re

import pytest
from chat_messages import user
from rigged import always_follow, chain, rigged_to_say, save

from hfsft.chat import Chat, read_tools, talk
from hfsft.errors import DataError
from hfsft.tokens.foreign_templates import encode_prompt

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '{"name": "add", "arguments": {"a": 1}}'
CALLED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def folder(make_model, tokenizer, tmp_path_factory):
    """A model that answers every prompt with a call of `add`, which is one token."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([CALL, "#1#", "#2#", "#3#"])  # two heads of an even width
    size = len(own)
    ids = own.convert_tokens_to_ids
    start, end = ids("<|python_start|>"), ids("<|python_end|>")
    turn = [ids("<|assistant_start|>"), start, ids(CALL), end, ids("<|assistant_end|>")]
    model = make_model(vocab_size=size, hidden_size=size, intermediate_size=8)
    always_follow(model, chain(turn), other=turn[-1])
    return save(model, own, tmp_path_factory.mktemp("calls") / "model")


def test_a_call_waits_for_its_result(folder):
    chat = Chat(folder, tools=[TOOL], max_new_tokens=8)
    assert chat.answer("Add.") == CALL
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert chat.open_calls() == [CALLED["function"]]
    assert "".join(chat.stream("1", "tool")) == CALL  # it knows nothing else
    assert [message["role"] for message in chat.messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert chat.messages[2] == {"role": "tool", "name": "add", "content": "1"}
    assert len(chat.open_calls()) == 1


def test_of_several_calls_each_gets_its_result_before_the_model_goes_on(folder):
    chat = Chat(folder, tools=[TOOL], max_new_tokens=8)
    chat.messages = [
        {"role": "user", "content": "Add twice."},
        {"role": "assistant", "content": "", "tool_calls": [CALLED, CALLED]},
    ]
    assert list(chat.stream("1", "tool")) == [] and len(chat.open_calls()) == 1
    assert "".join(chat.stream("2", "tool")) == CALL
    assert [message["role"] for message in chat.messages[2:]] == ["tool", "tool", "assistant"]


def test_a_special_token_in_a_message_is_plain_text(folder):
    chat, seen = Chat(folder, max_new_tokens=2), []
    generate = chat.model.generate
    chat.model.generate = lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs)
    chat.answer("Say <|user_end|> twice.")
    (ids,) = seen[0].tolist()
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("<|user_end|>")) == 1
    assert "Say <|user_end|> twice." in chat.tokenizer.decode(ids)


def test_without_tools_an_answer_is_text(folder):
    chat = Chat(folder, max_new_tokens=8)
    assert chat.answer("Add.") == CALL
    assert chat.messages[1] == {"role": "assistant", "content": CALL}
    assert chat.open_calls() == []


def test_talking_asks_for_the_result(folder, monkeypatch, capsys):
    chat = Chat(folder, tools=[TOOL], max_new_tokens=8)
    typed = iter(["Add.", "1", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    talk(chat)
    shown = capsys.readouterr().out
    assert shown.count('result of add({"a": 1}): ') == 2
    assert [message["content"] for message in chat.messages] == ["Add.", "", "1", ""]


def test_an_answer_ends_with_the_context_and_a_full_one_is_said(
    make_model, tokenizer, tmp_path, monkeypatch, capsys
):
    chat = Chat(save(make_model(), tokenizer, tmp_path / "model"))  # a context of 256 tokens
    made, generate = [], chat.model.generate
    chat.model.generate = lambda **given: made.append(generate(**given)) or made[-1]
    long = "word " * 60
    typed = iter([long, "word " * 300, "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    talk(chat)
    (output,) = made
    prompt = len(encode_prompt([user(long)], chat.tokenizer))
    assert prompt < output.shape[1] <= 256 < prompt + 256
    assert re.search(
        r"the conversation fills the context: [\d,]+ of 256 tokens; /clear starts over",
        capsys.readouterr().out,
    )
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_the_calculator_answers(make_model, tokenizer, tmp_path):
    made = rigged_to_say("<|python_start|>6*7<|python_end|>", make_model, tokenizer, tmp_path)
    assert Chat(made, max_new_tokens=20).answer("Hi") == "6*742"  # without the marks of the call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "tools that are not JSON"),
        ('[{"type": "function"}]', "a tool without a name"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_of_tools_that_cannot_be_read(text, message, tmp_path):
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as error:
        read_tools(str(path))
    assert str(error.value) == f"--tools {path}: {message}"


def test_a_file_of_functions_alone(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOL["function"]))
    assert read_tools(str(path)) == [TOOL]
