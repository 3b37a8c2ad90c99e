"""The checks of questions and answers, each with what it lets pass and what it refuses."""

import pytest
from teacher_server import lighthouse

from hfsft.documents.checking import (
    Refused,
    answer_of,
    question_key,
    question_of,
    require_no_phrase,
    require_run,
    require_supported,
)

PASSAGE = lighthouse("Brandvik", 1871)


@pytest.mark.parametrize(
    ("wrote", "question"),
    [
        ("When was it built?", "When was it built?"),
        ("**Question 1:** When was it built?\nAnswer: 1871.", "When was it built?"),
        ('<think>Hm, what?\n</think>\n\nSure!\n1. "Who built it?"', "Who built it?"),
        ("- Who built it? (fishermen)", "Who built it? (fishermen)"),
        ("什么时候建成的？", "什么时候建成的？"),  # noqa: RUF001
    ],
)
def test_the_question_is_found_in_what_was_written(wrote, question):
    assert question_of(wrote) == question


def test_a_text_without_a_question_or_an_answer_is_refused():
    with pytest.raises(Refused, match=r"^no question$"):
        question_of("It was built in 1871.")
    with pytest.raises(Refused, match=r"^an empty answer$"):
        answer_of("<think>Who knows?</think>\n Answer: ")
    for find in (question_of, answer_of):
        with pytest.raises(Refused, match=r"^thoughts without an end$"):
            find("\n<think>Who built it? Fishermen, says the text.")


@pytest.mark.parametrize("label", ["A:", "a1: ", "**Answer:** ", "Answer 2) ", "answer. ", "Q:"])
def test_an_answer_s_label_is_left_out(label):
    assert answer_of(f"{label}In 1871.\n\nBy fishermen.") == "In 1871.\n\nBy fishermen."


@pytest.mark.parametrize(
    "answer", ["1. Mix.\n2. Stir.", "A. Smith built it.", "3.14 is pi.", "2) It.", "A) x", "-5"]
)
def test_an_answer_that_only_begins_like_a_label_is_whole(answer):
    assert answer_of(answer) == answer
    assert answer_of(f"Answer: {answer}") == answer


def refusal(answer: str, question: str = "", least: float = 0.6) -> str:
    """The reason why an answer about the lighthouse is refused, or ""."""
    try:
        require_supported(answer, PASSAGE, least, "answer")
        require_run(answer, PASSAGE, question)
    except Refused as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize(
    "answer",
    [
        "It was built in 1871 by local fishermen.",
        "Local fishermen.",
        "1871",
        "A narrow staircase, which visitors climb every summer.",
        "Its lamps were burning whale oil until electric light replaced it.",
    ],
)
def test_an_answer_from_the_passage_is_kept(answer):
    assert refusal(answer, "When was the lighthouse of Brandvik built?") == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It was built in 1872 by local fishermen.", "a number in the answer that is not in"),
        ("It was built by the fisherman Ole.", "a name in the answer that is not in the passage"),
        ("Python lists can be reversed in place.", "the answer does not stand in the passage"),
        ("The lighthouse of Brandvik was built.", "the answer does not stand in the passage"),
        ("Fishermen and visitors like the harbour.", "the answer does not stand in the passage"),
        ("Yes.", "the answer does not stand in the passage"),
    ],
)
def test_an_answer_from_elsewhere_is_refused(answer, reason):
    assert refusal(answer, "When was the lighthouse of Brandvik built?").startswith(reason)


def test_acronyms_count_as_words():
    require_supported("What is LTO and PGO?", "LTO and PGO.", 0.6, "question")
    with pytest.raises(Refused, match=r"^the question does not stand in the passage$"):
        require_supported("What is a man?", "LTO and PGO.", 0.3, "question")


def test_numbers_are_compared_without_their_separators():
    require_supported("It has 1,024 steps.", "There are 1024 steps.", 0.5, "answer")
    with pytest.raises(Refused, match="a number"):
        require_supported("It has 102 steps.", "There are 1024 steps.", 0.5, "answer")


def test_scripts_without_spaces_are_compared_by_character():
    passage = "灯塔建于一八七一年，由渔民建造。"  # noqa: RUF001
    require_supported("由渔民建造", passage, 1.0, "answer")
    with pytest.raises(Refused):
        require_supported("它是蓝色的", passage, 0.6, "answer")


def test_phrases_are_refused_unless_the_passage_has_them():
    phrases = ("the text", "i'm sorry")
    require_no_phrase("The texture is rough.", phrases, "", "no")
    require_no_phrase("He said: I'm sorry.", phrases, "“I’m  sorry”, he said.", "no")  # noqa: RUF001
    with pytest.raises(Refused, match=r"^refused$"):
        require_no_phrase("I’m sorry, but", phrases, "", "refused")  # noqa: RUF001
    with pytest.raises(Refused):
        require_no_phrase("What is the text about?", phrases, "", "unclear")


def test_questions_of_the_same_words_are_the_same():
    assert question_key("Who built it, and when?") == question_key("When, and who built it")
    assert question_key("Who built it?") != question_key("Who broke it?")
