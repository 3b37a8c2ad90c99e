"""The file of prompts: what it may hold, and what becomes of the passage in it."""

import pytest

from hfsft.documents.prompts import load_prompts
from hfsft.errors import RecipeError


def test_the_default_prompts_name_the_passage_and_the_question():
    prompts = load_prompts()
    for number in (0, 1):
        assert prompts.given("PASSAGE", number) is None
        [message] = prompts.for_question("PASSAGE", number)
        assert message["content"].startswith("PASSAGE\n\n---\n")
    assert prompts.given("PASSAGE", 2).endswith(":\n\nPASSAGE")
    assert prompts.for_question("P", 3) == prompts.for_question("P", 0)
    [message] = prompts.for_answer("has a {question} in it", "Why?")
    assert message["content"].startswith("has a {question} in it\n\n---\n")
    assert message["content"].rstrip().endswith("\n\nWhy?")


def test_a_file_changes_the_parts_that_it_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'system: Be brief.\nrequest: {seed: null, top_p: 0.9}\nrefusals: ["Je ne PEUX"]\n'
    )
    prompts, default = load_prompts(path), load_prompts()
    assert prompts.request == {"seed": None, "top_p": 0.9}
    assert prompts.refusals == ("je ne peux",)
    assert prompts.questions == default.questions
    assert prompts.for_given("Go.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "{path}:1: expected a mapping of prompts, got a list"),
        ("anser: x", "{path}:1: unknown key 'anser'; did you mean 'answer'?"),
        ("answer: '{passage}'", "{path}:1: answer: needs {question}"),
        ("\nquestions: [ask]", "{path}:2: questions: needs {passage}"),
        ("questions: []\nrequests: []", "{path}: has neither questions nor requests"),
        ("request: {model: x}", "{path}:1: request.model: hfsft sets it"),
        ("refusals: no", "{path}:1: phrases: expected a list of texts, got "),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_prompts(path)
    assert str(error.value).startswith(message.replace("{path}", str(path)))
