"""Grading: the number and the program of an answer, by our rule and by nanochat's."""

from decimal import Decimal

import pytest

from hfsft.evaluation.grading import final_number, nanochat_number, nanochat_program, program


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 6.\n#### 1,234.0", "1234"),
        ("#### $18.", "18"),
        ("#### -3", "-3"),
        ("#### 5 of 9", "5"),
        ("#### 4\nNo, it is\n#### 5", "5"),
        (r"Hence \boxed{42}.", "42"),
        (r"\boxed{\$1,000}", "1000"),
        (r"\boxed{\text{about }7}", "7"),
        ("3 + 4 is 7.", "7"),
        ("It takes 12.50 dollars", "12.5"),
        ("a range of 3-5", "5"),
        (".5", "0.5"),
        ("#### none of the 3", "3"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "9 apples\n#### none", r"8: \boxed{x}"])
def test_no_final_number(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234.0", "1234.0"),
        ("#### -3 or #### 4", "-3"),
        ("so 6.\n#### 18.", "18."),
        ("#### $18", None),
        ("####18", None),
        ("\\boxed{18}", None),
    ],
)
def test_nanochats_number(text, number):
    assert nanochat_number(text) == number


def test_program_keeps_the_prompts_imports():
    assert program("from typing import List\n\ndef f():\n", "f", "def f(): return List").startswith(
        "from typing import List\ndef f()"
    )


def test_nanochats_program():
    prompt = "import re\n# text\n from typing import List\n\ndef f():\n    import os\n"
    assert nanochat_program(prompt, "x\n```python \n\ncode\n\n```\n") == (
        "import re\nfrom typing import List\n\ncode\n"
    )
    assert nanochat_program("def f():\n", " code ") == "\ncode\n"
