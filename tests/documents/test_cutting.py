"""Passages: bounded, at good places, and together the whole document."""

import random

import pytest

from hfsft.documents.cutting import passages
from hfsft.documents.reading import Document


def cut(text: str, most: int) -> list[str]:
    found = list(passages(Document("a.txt", text), most))
    assert all(text[one.start : one.end] == one.text for one in found)
    return [one.text for one in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", ["short"]),
        ("# One\n\ntext text\n# Two\n\nmore", ["# One\n\ntext text", "# Two\n\nmore"]),
        ("one two three\n\nfour five six", ["one two three", "four five six"]),
        ("one two three\nfour five six", ["one two three", "four five six"]),
        ("One two three. Four five six.", ["One two three.", "Four five six."]),
        ("one two three four five", ["one two three four", "five"]),
        ("x" * 25, ["x" * 20, "x" * 5]),
        (" \n\n ", []),
    ],
)
def test_a_passage_ends_at_the_best_place(text, expected):
    assert cut(text, 20) == expected


def test_only_white_space_is_left_out():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab.\n #\u3002\U0001f600") for _ in range(rng.randrange(300)))
        found = cut(text, 37)
        assert all(0 < len(one) <= 37 for one in found)
        assert "".join("".join(found).split()) == "".join(text.split())


def test_the_source_names_the_page_of_a_pdf():
    document = Document("a.pdf", "one\n\ntwo\n\n", (0, 5))
    assert [one.source() for one in passages(document, 4)] == [
        {"file": "a.pdf", "start": 0, "end": 3, "page": 1},
        {"file": "a.pdf", "start": 5, "end": 8, "page": 2},
    ]
