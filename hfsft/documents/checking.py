"""Checks of what the teacher wrote: a question, an answer to it, both from the passage.

Every check compares words, so it finds an answer about something else and an invented number or
name, but not a statement that the passage's own words turn into its opposite.
"""

import re
from collections.abc import Sequence

# a word; where a script has no spaces between words, a character
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff_]+")
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
NAME = re.compile(r"(?<=[^.!?:\n\"]\s)[^\W\d_][\w'-]+")  # a word that does not start a sentence

QUESTION_MARKS = "?\uff1f\u061f"

# what a model may put before a question
LABEL = re.compile(r"^(?:\W*(?:question|answer|q|a)\s*\d*\s*[:.)]\W*|\d+[.)]\s*)", re.IGNORECASE)
# of an answer only what is no list ("1. Mix ..."), initial ("A. Smith") or number ("3.14 is ...")
ANSWER_LABEL = re.compile(
    r"\A\W*(?:(?:question|answer)\s*\d*\s*[:.)]|[qa]\s*\d*\s*:)[\s*_]*", re.IGNORECASE
)
THOUGHTS = re.compile(r"\A.*</think(?:ing)?>", re.S)
UNCLOSED = re.compile(r"\A\s*<think(?:ing)?>")

LETTERS = 4  # shorter words are in every text
STEM = 6  # letters of a word that are compared, so that "cached" is "caching"


class Refused(Exception):
    """A row that is not kept; its message is the reason."""


def question_of(text: str) -> str:
    """The question in what the teacher wrote: its first line with a question mark.

    Raises:
        Refused: if there is none.
    """
    for line in _without_thoughts(text).splitlines():
        line = LABEL.sub("", line.strip(" \t*#>\"'`-")).strip(" \t*\"'`")
        if any(mark in line for mark in QUESTION_MARKS):
            return line
    raise Refused("no question")


def answer_of(text: str) -> str:
    """The answer in what the teacher wrote, without its thoughts and a label.

    Raises:
        Refused: if nothing is left.
    """
    answer = ANSWER_LABEL.sub("", _without_thoughts(text).strip()).strip()
    if not answer:
        raise Refused("an empty answer")
    return answer


def _without_thoughts(text: str) -> str:
    text = THOUGHTS.sub("", text)
    if UNCLOSED.match(text):
        raise Refused("thoughts without an end")
    return text


def require_no_phrase(text: str, phrases: Sequence[str], passage: str, reason: str) -> None:
    """Check that a text has none of some phrases, apart from those that the passage has too.

    Args:
        text: a question or an answer.
        phrases: in lower case.
        passage: the one it is about.
        reason: of the refusal.

    Raises:
        Refused: with that reason.
    """
    lowered, there = _plain(text), _plain(passage)
    for phrase in phrases:
        found = re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", lowered)
        if found and phrase not in there:
            raise Refused(reason)


def require_supported(text: str, passage: str, least: float, what: str) -> None:
    """Check that the words of a text stand in a passage.

    Every number and name must; of the other words of four letters or more, compared by their first
    six, a share. The share is the coverage of Grusky et al. (2018), Newsroom, over words.

    Args:
        text: a question or an answer.
        passage: the one it is about.
        least: the share, from 0 to 1.
        what: "question" or "answer", for the reason.

    Raises:
        Refused: with the reason.
    """
    there = stems(passage)
    if set(_numbers(text)) - set(_numbers(passage)):
        raise Refused(f"a number in the {what} that is not in the passage")
    names = [name for name in NAME.findall(text) if name[0].isupper() and len(name) > 1]
    if any(not stems(name) <= there for name in names):
        raise Refused(f"a name in the {what} that is not in the passage")
    words = content_stems(text)
    if words and len(words & there) < least * len(words):
        raise Refused(f"the {what} does not stand in the passage")


def require_run(answer: str, passage: str, question: str) -> None:
    """Check that an answer says something as the passage does, and more than its question.

    Args:
        answer: at least one pair of its neighbouring words must be neighbours in the passage too,
            and one of the two must not be in the question. Numbers, acronyms and words of four
            letters or more are counted; of an answer with a single such word, the word.
        passage: the one it is about.
        question: the one it answers.

    Raises:
        Refused: if there is no such pair.
    """
    words, given = _content(answer), set(_content(question))
    size = min(2, len(words))
    there = set(_runs(_content(passage), size))
    if not any(run in there and not given.issuperset(run) for run in _runs(words, size)):
        raise Refused("the answer does not stand in the passage")


def stems(text: str) -> set[str]:
    """The words of a text, in lower case, without a plural s, cut to `STEM` letters."""
    return {_stem(word) for word in WORD.findall(text)}


def content_stems(text: str) -> set[str]:
    """The same of acronyms and words of at least `LETTERS` letters; `_numbers` has the numbers."""
    return {word for word in _content(text) if not word.isdigit()}


def question_key(question: str) -> tuple[str, ...]:
    """What two questions share that ask the same in another order, case or punctuation."""
    return tuple(sorted({word.casefold() for word in WORD.findall(question)}))


def _content(text: str) -> list[str]:
    """The stems of a text's numbers, acronyms and longer words, in order."""
    return [_stem(word) for word in WORD.findall(text) if _is_content(word)]


def _is_content(word: str) -> bool:
    acronym = len(word) > 1 and word.isupper()
    return len(word) >= LETTERS or acronym or word.isdigit() or bool(UNSPACED.match(word))


def _runs(words: list[str], size: int) -> list[tuple[str, ...]]:
    """Every run of neighbouring words."""
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def _stem(word: str) -> str:
    word = word.casefold()
    return (word[:-1] if word.endswith("s") and len(word) > 3 else word)[:STEM]


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in NUMBER.findall(text)]


def _plain(text: str) -> str:
    return " ".join(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold().split())
