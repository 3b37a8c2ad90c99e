"""The tasks of hfsft eval: rows in each schema, prompts, and grading."""

import json
from pathlib import Path

import pytest

from hfsft.errors import DataError, HfsftError
from hfsft.evaluation.tasks import check_names, default_tasks, load_task

MMLU = Path(__file__).parents[1] / "rows" / "mmlu.jsonl"  # 25 real ones
GSM8K = [
    {"question": "Two pens at 3 each?", "answer": "2*3 = $<<2*3=6>>6.\n#### 6"},
    {"question": "A town grows.", "answer": "1000+234 = <<1000+234=1234>>1,234\n#### 1,234"},
    {"question": "It got colder.", "answer": "From 2 to <<2-5=-3>>-3.\n#### -3"},
]
HUMAN_EVAL = [
    {
        "task_id": "own/0",
        "prompt": "from typing import List\n\n\ndef longest(words: List[str]) -> str:\n"
        '    """Return the longest word."""\n',
        "entry_point": "longest",
        "canonical_solution": "    return max(words, key=len)\n",
        "test": "def check(candidate):\n    assert candidate(['a', 'bcd', 'ef']) == 'bcd'\n",
    },
    {
        "task_id": "own/1",
        "prompt": 'def is_even(n):\n    """Whether n is even."""\n',
        "entry_point": "is_even",
        "canonical_solution": "    return n % 2 == 0\n",
        "test": "def check(candidate):\n    assert candidate(4)\n    assert not candidate(7)\n",
    },
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_rows(tmp_path):
    task = load_task("gsm8k", "m", data=write(tmp_path / "rows.jsonl", GSM8K))
    assert task.kind == "generative" and len(task.questions) == 3
    right = ["#### 6", "It is #### 1234.00", "the answer: -3"]
    assert [q.is_right(a) for q, a in zip(task.questions, right, strict=True)] == [True] * 3
    assert [q.is_right("#### 7") for q in task.questions] == [False] * 3
    assert not any(q.is_right("") for q in task.questions)
    # nanochat compares what follows the first mark as text
    for answer, expected in (
        ("#### 6", [True, False, False]),
        ("#### 1,234", [False, True, False]),
        ("#### -3", [False, False, True]),
        ("#### 6\n#### 7", [True, False, False]),
        ("#### 6.0", [False] * 3),
        ("#### 6.", [False] * 3),
        ("####6", [False] * 3),
        ("It is 6", [False] * 3),
    ):
        assert [q.nanochat_is_right(answer) for q in task.questions] == expected, answer


def test_real_mmlu_rows():
    task = load_task("mmlu", "m", data=str(MMLU))
    assert task.kind == "categorical" and len(task.questions) == 25
    assert all(q.choices == ("A", "B", "C", "D") for q in task.questions)
    mars = next(q for q in task.questions if "Why is Mars red?" in q.prompt)
    assert mars.answer == "A"
    assert '- Because the surface is covered with heavily oxidized ("rusted") minerals.=A' in (
        mars.prompt
    )


def test_arc_rows_with_other_labels(tmp_path):
    rows = [
        {
            "question": "2+2?",
            "choices": {"text": ["3", "4", "5"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {"question": "Up?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    ]
    task = load_task("arc_easy", "m", data=write(tmp_path / "rows.jsonl", rows))
    assert [(q.choices, q.answer) for q in task.questions] == [
        (("1", "2", "3"), "2"),
        (("A", "B"), "A"),
    ]


def test_a_seeded_sample_of_rows():
    first = load_task("mmlu", "m", 5, 1, str(MMLU)).questions
    assert first == load_task("mmlu", "m", 5, 1, str(MMLU)).questions
    assert first != load_task("mmlu", "m", 5, 2, str(MMLU)).questions
    assert len({question.digest for question in first}) == 5


def test_a_bad_row_is_reported_by_number(tmp_path):
    data = write(tmp_path / "rows.jsonl", [GSM8K[0], {"question": "x", "answer": "no number"}])
    with pytest.raises(DataError, match="row 1: an answer without a number"):
        load_task("gsm8k", "m", data=data)
    data = write(tmp_path / "other.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="row 0: "):
        load_task("humaneval", "m", data=data)


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef longest(words):\n    return max(words, key=len)\n```",
        "Sure:\n```\nimport re\ndef longest(words: List[str]) -> str:\n"
        "    return max(words, key=len)\n```\nIt works.",
        "def longest(words):\n    return max(words, key=len)",
        "    return max(words, key=len)\n",  # continues the prompt
        "```py\n    return max(words, key=len)",  # truncated
        "```python3\ndef longest(words):\n    return max(words, key=len)\n```",
        "``` Python\ndef longest(words):\n    return max(words, key=len)\n```",
        "Run\n```bash\npython x.py\n```\nof\n```python\nimport sys\n```\nthen\n"
        "```python\ndef longest(words):\n    return max(words, key=len)\n```",
    ],
)
def test_human_eval_takes_an_answer_in_any_of_its_forms(tmp_path, answer):
    data = write(tmp_path / "rows.jsonl", HUMAN_EVAL)
    question = load_task("humaneval", "m", data=data).questions[0]
    assert question.is_right(answer)
    assert question.plain == question.prompt


def test_human_eval_by_nanochats_rule(tmp_path):
    question = load_task(
        "humaneval", "m", data=write(tmp_path / "rows.jsonl", HUMAN_EVAL)
    ).questions[0]
    function = "def longest(words: List[str]):\n    return max(words, key=len)"
    for answer in (
        f"```python\n{function}\n```",
        f"So:\n```\n{function}\n```",
        f"\n{function}\n",
        f"```python\n{function}\n```\n```python\n1 / 0\n```",
    ):
        assert question.nanochat_is_right(answer) and question.is_right(answer), answer
    for answer in (
        "    return max(words, key=len)\n",  # continues the prompt
        f"```python3\n{function}\n```",
        f"```py\n{function}\n```",
        f"```python\n{function}",  # truncated
        f"```python\nx = 1\n```\n```python\n{function}\n```",  # not the first block
    ):
        assert not question.nanochat_is_right(answer) and question.is_right(answer), answer


def test_human_eval_grades(tmp_path):
    task = load_task("humaneval", "m", data=write(tmp_path / "rows.jsonl", HUMAN_EVAL))
    own = [row["canonical_solution"] for row in HUMAN_EVAL]
    assert [q.is_right(a) for q, a in zip(task.questions, own, strict=True)] == [True, True]
    wrong = ["    return words[0]\n", "    return True\n"]
    assert [q.is_right(a) for q, a in zip(task.questions, wrong, strict=True)] == [False, False]
    assert not task.questions[1].is_right("    import sys; sys.exit(0)\n")
    assert not task.questions[1].is_right("I do not know.")


def test_generated_tasks_grade_their_own_answers():
    for name in ("simple_spelling", "spelling_bee", "arithmetic"):
        task = load_task(name, "m", rows=20)
        assert len(task.questions) == 20
        assert all(question.is_right(question.answer) for question in task.questions)
        assert not any(question.is_right("") for question in task.questions)


def test_more_rows_than_a_generated_task_has():
    assert load_task("arithmetic", "m", rows=499).pool == 499
    with pytest.raises(DataError, match="arithmetic: there are only 499 held-out pairs of numbers"):
        load_task("arithmetic", "m", rows=500)


def test_reasoning_gym_scores_with_its_own_scorer():
    pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:chain_sum", "m", rows=20)
    assert all(question.is_right(question.answer) for question in task.questions)
    assert not any(question.is_right("no idea") for question in task.questions)


def test_names_are_checked():
    check_names(["arc_easy", "reasoning_gym:chain_sum", "lm_eval:piqa"], allow_code=False)
    with pytest.raises(HfsftError, match="no task arc_eazy; did you mean 'arc_easy'"):
        check_names(["arc_eazy"], allow_code=False)
    with pytest.raises(HfsftError, match="--allow_code"):
        check_names(["humaneval"], allow_code=False)
    check_names(["humaneval"], allow_code=True)


def test_default_tasks():
    assert "humaneval" not in default_tasks("some/model", allow_code=False)
    assert default_tasks("some/model", allow_code=True) == [
        *("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
    ]


def test_data_for_a_task_that_generates_its_own():
    with pytest.raises(DataError, match="arithmetic takes no data"):
        load_task("arithmetic", "m", data="x.jsonl")


def test_held_out_without_a_run(tmp_path):
    with pytest.raises(DataError, match="not the stage of a run"):
        load_task("held_out", str(tmp_path))
