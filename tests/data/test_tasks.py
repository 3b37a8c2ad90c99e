"""Built-in tasks and texts: reproducible rows, correct answers, train and test kept apart."""

import hashlib
import json
import re
import string
import subprocess
import sys
from itertools import pairwise

import pytest

from hfsft.data import tasks

GRADED = ("simple_spelling", "spelling_bee", "arithmetic")


def contents(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]]


def fingerprint(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def spelled_word(name: str, row: dict) -> str:
    """The word of a spelling row, read from its answer alone."""
    lines = contents(row)[1].splitlines()
    return lines[0].split(":")[0] if name == "simple_spelling" else lines[1].removesuffix(":")


def number_pair(row: dict) -> tuple[int, int]:
    a, b = re.match(r"(\d+) [+-] (\d+) = ", contents(row)[1]).groups()
    return min(int(a), int(b)), max(int(a), int(b))


# A change here changes every run made with the built-in tasks: say so in the changelog.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", "f3e4df8bbca64936"),
        ("simple_spelling", "1e37626852b1520e"),
        ("spelling_bee", "16a61eee840f29f3"),
        ("arithmetic", "5e76bab8e3884de5"),
        ("small_talk", "61887fb85d79adb8"),
    ],
)
def test_rows_never_change(name, expected):
    assert fingerprint(tasks.task_rows(name, 50, "train", seed=7)) == expected


def test_rows_are_the_same_in_another_process():
    code = (
        "import json; from hfsft.data.tasks import TASKS, task_rows;"
        "print(json.dumps([task_rows(name, 20, 'test', 3) for name in TASKS]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert json.loads(output) == [tasks.task_rows(name, 20, "test", 3) for name in tasks.TASKS]


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_fewer_rows_are_a_prefix(name, split):
    rows = tasks.task_rows(name, 300, split, seed=1)
    assert len(rows) == 300
    assert tasks.task_rows(name, 40, split, seed=1) == rows[:40]
    assert tasks.task_rows(name, 0, split, seed=1) == []
    assert tasks.task_rows(name, 300, split, seed=2) != rows


@pytest.mark.parametrize("name", tasks.TASKS)
def test_default_size_and_variety(name):
    rows = tasks.task_rows(name)
    assert len(rows) == tasks.DEFAULT_ROWS[name] == (500 if name == "small_talk" else 1000)
    distinct = {json.dumps(row) for row in rows}
    assert len(distinct) >= 0.93 * len(rows)


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_rows_are_conversations_of_plain_strings(name, split):
    for row in tasks.task_rows(name, 400, split):
        assert list(row) == ["messages"]
        roles = [message["role"] for message in row["messages"]]
        turns = len(roles) // 2
        assert roles == ["user", "assistant"] * turns
        assert 1 <= turns <= (3 if name in ("identity", "small_talk") else 1)
        for message in row["messages"]:
            assert list(message) == ["role", "content"]
            content = message["content"]
            assert type(content) is str and content == content.strip() != ""
            assert content.isascii() and "{" not in content


def test_spelling_holds_out_the_same_words_for_every_seed():
    words = {
        split: {
            spelled_word(name, row)
            for name in ("simple_spelling", "spelling_bee")
            for seed in (0, 1, 42)
            for row in tasks.task_rows(name, None if split == "test" else 4000, split, seed)
        }
        for split in tasks.SPLITS
    }
    assert not words["train"] & words["test"]
    assert 0.08 < len(words["test"]) / len(words["train"] | words["test"]) < 0.12


@pytest.mark.parametrize("name", GRADED)
def test_graded_test_rows_do_not_repeat_until_the_pool_is_used_up(name):
    pool = tasks.pool_size(name, "test")
    assert pool == (499 if name == "arithmetic" else 874)
    rows = tasks.task_rows(name, pool, "test", seed=4)
    subject = number_pair if name == "arithmetic" else lambda row: spelled_word(name, row)
    assert len({subject(row) for row in rows}) == pool
    with pytest.raises(ValueError, match=f"only {pool} held-out .*, fewer than {pool + 1} rows"):
        tasks.task_rows(name, pool + 1, "test")
    assert tasks.pool_size(name, "train") == (4551 if name == "arithmetic" else 8126)
    assert len(tasks.task_rows(name, 2 * pool, "train")) == 2 * pool
    assert tasks.pool_size("identity", "test") is None


@pytest.mark.parametrize("name", ["simple_spelling", "spelling_bee"])
def test_no_test_word_in_20000_train_rows(name):
    train = {spelled_word(name, row) for row in tasks.task_rows(name, 20_000, "train", 5)}
    test = {spelled_word(name, row) for row in tasks.task_rows(name, None, "test", 6)}
    assert len(train) > 7000 and len(test) > 800
    assert not train & test


def test_no_test_pair_in_20000_train_rows():
    train, test = (
        {
            number_pair(row)
            for seed in (0, 1, 42)
            for row in tasks.task_rows(
                "arithmetic", 20_000 if split == "train" else None, split, seed
            )
        }
        for split in tasks.SPLITS
    )
    assert not train & test
    assert (
        5000 < len(train | test) <= 5050
    )  # nearly every pair of numbers from 0 to 99, whatever the order
    assert 400 < len(test) < 620


def test_simple_spelling_spells():
    for row in tasks.task_rows("simple_spelling", 500):
        question, answer = contents(row)
        word = question.removeprefix("Spell the word: ")
        assert re.fullmatch("[a-z]{3,12}", word)
        assert answer == word + ":" + ",".join(word)


def test_spelling_bee_counts_correctly():
    counts = []
    for row in tasks.task_rows("spelling_bee", 2000):
        question, answer = contents(row)
        first, second, *steps, last = answer.split("\n")
        letter, word = first.removeprefix("Letter: "), second.removesuffix(":")
        assert letter in string.ascii_lowercase and len(letter) == 1
        # The question really asks for this letter in this word.
        assert re.search(rf"\b{word}\b", question)
        assert re.search(rf"(?<![a-z']){letter}('s)?(?![a-z])|['\"]{letter}['\"]", question)
        assert "".join(step[0] for step in steps) == word
        seen = 0
        for step in steps:
            seen += step[0] == letter
            assert step[1:] == f":{seen}"
        assert last == f"#### {seen}"
        counts.append(seen)
    assert 0.10 < counts.count(0) / len(counts) < 0.20
    assert 0.30 < counts.count(1) / len(counts) < 0.60  # always answering 1 does not pay


def test_spelling_bee_questions_vary():
    questions = [contents(row)[0] for row in tasks.task_rows("spelling_bee", 2000)]
    assert len(set(tasks.phrases("spelling_bee")["questions"])) >= 30
    assert sum(question.islower() for question in questions) > 200
    assert sum("'" in question or '"' in question for question in questions) > 200
    assert 200 < sum(question.endswith("?") for question in questions) < 1800


def test_arithmetic_is_right():
    signs = set()
    for row in tasks.task_rows("arithmetic", 2000):
        question, answer = contents(row)
        a, sign, b, result, final = re.fullmatch(
            r"(\d+) ([+-]) (\d+) = (\d+)\n#### (\d+)", answer
        ).groups()
        assert 0 <= int(a) <= 99 and 0 <= int(b) <= 99
        assert int(result) == int(final) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert sorted(re.findall(r"\d+", question)) == sorted([a, b])
        signs.add(sign)
    assert signs == {"+", "-"}


def test_every_arithmetic_question_names_both_numbers():
    plus, minus = tasks.phrases("arithmetic")["plus"], tasks.phrases("arithmetic")["minus"]
    for question in plus + minus:
        assert "{a}" in question and "{b}" in question
    assert minus[5].format(a=9, b=4) == "Take 4 away from 9."


def test_identity_answers_agree():
    topics = tasks.phrases("identity")["topics"]
    answers = topics["who"]["answers"]
    assert all(answer.startswith("I am hfsft, a small language model") for answer in answers)
    assert len(topics) >= 10
    assert sum(len(topic["questions"]) for topic in topics.values()) >= 80
    replies = [
        message["content"]
        for row in tasks.task_rows("identity")
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    assert sum(reply.startswith("I am hfsft, a small language model") for reply in replies) > 400
    assert max(len(re.findall(r"[.!?](?:\s|$)", reply)) for reply in replies) <= 3
    every = [question for topic in topics.values() for question in topic["questions"]]
    assert len(every) == len(set(every))


def test_small_talk_has_enough_phrases():
    exchanges = [
        exchange for section in tasks.phrases("small_talk").values() for exchange in section
    ]
    questions = [exchange["user"] for exchange in exchanges]
    assert len(questions) == len(set(questions)) >= 60
    assert all(exchange["answers"] for exchange in exchanges)


@pytest.mark.parametrize("name", GRADED)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_grade_accepts_every_reference_and_refuses_the_next_row(name, split):
    rows = tasks.task_rows(name, 200, split)
    for row, other in pairwise(rows):
        answer, wrong = contents(row)[1], contents(other)[1]
        assert tasks.grade(name, row, answer)
        assert tasks.grade(name, row, f"\n{answer}  \n")
        same = answer.split("#### ")[-1] == wrong.split("#### ")[-1]
        assert tasks.grade(name, row, wrong) == same
        assert not tasks.grade(name, row, "")


def test_grade_reads_the_number_after_the_last_mark():
    row = {"messages": [{"role": "user", "content": "What is 7 + 5?"}]}
    row["messages"].append({"role": "assistant", "content": "7 + 5 = 12\n#### 12"})
    for right in (
        "#### 12",
        "####12.",
        "7 + 5 = 13\n#### 13\nNo:\n#### 12",
        "#### 012",
        "#### 12 ok",
    ):
        assert tasks.grade("arithmetic", row, right), right
    for wrong in ("12", "#### 13", "#### 12\n#### 13", "#### 12.5", "#### 123", "#### -12", "####"):
        assert not tasks.grade("arithmetic", row, wrong), wrong


def test_grade_wants_the_spelling_letter_for_letter():
    (row,) = tasks.task_rows("simple_spelling", 1)
    word = spelled_word("simple_spelling", row)
    for wrong in (word, ",".join(word), f"{word}:{','.join(word)},", f"{word}: {','.join(word)}"):
        assert not tasks.grade("simple_spelling", row, wrong)


@pytest.mark.parametrize("name", ["identity", "small_talk"])
def test_talk_is_not_graded(name):
    (row,) = tasks.task_rows(name, 1)
    with pytest.raises(ValueError, match=f"'{name}' has no right or wrong answers"):
        tasks.grade(name, row, contents(row)[-1])


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="unknown task 'speling_bee'; did you mean 'spelling_bee'"):
        tasks.task_rows("speling_bee")
    with pytest.raises(ValueError, match="unknown split 'validation'; there are train, test"):
        tasks.task_rows("arithmetic", split="validation")
    with pytest.raises(ValueError, match="unknown text 'speech'; did you mean 'speeches'"):
        tasks.text_rows("speech")
    with pytest.raises(ValueError, match="unknown task 'poetry'"):
        tasks.grade("poetry", {"messages": []}, "")
    with pytest.raises(ValueError, match="negative"):
        tasks.task_rows("arithmetic", -1)


@pytest.mark.parametrize(
    ("name", "documents", "characters"), [("speeches", 81, 2_505_675), ("facts", 6880, 590_634)]
)
def test_texts_are_complete_and_clean(name, documents, characters):
    rows = tasks.text_rows(name)
    texts = [row["text"] for row in rows]
    assert all(list(row) == ["text"] for row in rows)
    assert texts == tasks.TEXTS[name]()
    assert (len(texts), sum(map(len, texts))) == (documents, characters)
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text == text.strip() and len(text) >= 20
        assert text.isascii() and not set("\f\r\t|") & set(text)
        assert text[-1] in ".!?'\")"


def test_callers_cannot_change_the_embedded_text():
    tasks.TEXTS["facts"]().clear()
    assert len(tasks.TEXTS["facts"]()) == 6880


def test_words_are_plain_sorted_and_many():
    words = (tasks.DATA / "words.txt").read_text().splitlines()
    assert 8000 <= len(words) <= 10_000
    assert words == sorted(set(words))
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in words)
    assert {"apple", "water", "freedom", "people"} <= set(words)


def test_data_stays_small():
    files = {path.name: path.stat().st_size for path in tasks.DATA.iterdir()}
    phrases = {f"{task}.yaml" for task in ("identity", "small_talk", "spelling_bee", "arithmetic")}
    assert set(files) == {"speeches.txt.gz", "facts.txt.gz", "words.txt", *phrases}
    assert sum(files.values()) < 1_400_000
    assert files["speeches.txt.gz"] < 900_000


def test_import_reads_no_data_and_nothing_heavy():
    code = (
        "import sys, hfsft.data.tasks as tasks;"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'difflib', 'yaml'};"
        "assert not heavy & set(sys.modules);"
        "assert tasks._words.cache_info().currsize == tasks._speeches.cache_info().currsize == 0;"
        "assert tasks.phrases.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
