"""Built-in sources, so that a run can start without a download.

There are two kinds. `TEXTS` are documents for the base stage. `TASKS` generate conversations for
the mid and SFT stages and for evaluation:

| task | teaches | default number of rows | graded |
|---|---|---|---|
| identity | who the model is | 1000 | no |
| small_talk | greetings, thanks, short everyday questions | 500 | no |
| simple_spelling | spelling a word | 1000 | yes |
| spelling_bee | counting a letter in a word, letter by letter | 1000 | yes |
| arithmetic | sums and differences of numbers below 100 | 1000 | yes |

Their phrases and words are in `builtin/`: `identity.yaml`, `small_talk.yaml`, `spelling_bee.yaml`,
`arithmetic.yaml` and `words.txt`. Editing one changes the rows of every run that uses the task.

A row depends only on the task, the split, the seed and its index, so the first 100 rows are the
same whether 100 or 1000 are generated. A hash assigns each word and each pair of numbers to
"train" or "test", independently of the seed; both spelling tasks hold out the same words. A graded
task's test rows never repeat a word or a pair, so that each is independent evidence; there are
`pool_size` of them. Train rows do repeat.
"""

import gzip
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

DATA = Path(__file__).parent / "builtin"
SPLITS = ("train", "test")

DEFAULT_ROWS = {  # rows of a task when the caller gives no number
    "identity": 1000,
    "simple_spelling": 1000,
    "spelling_bee": 1000,
    "arithmetic": 1000,
    "small_talk": 500,
}

Message = dict[str, str]  # {"role": "user" or "assistant", "content": ...}


# --- embedded text ---


@cache
def _speeches() -> tuple[str, ...]:
    text = gzip.decompress((DATA / "speeches.txt.gz").read_bytes()).decode("ascii")
    return tuple(text.strip().split("\n\f\n"))


@cache
def _facts() -> tuple[str, ...]:
    return tuple(gzip.decompress((DATA / "facts.txt.gz").read_bytes()).decode("ascii").splitlines())


def speeches() -> list[str]:
    """State of the Union addresses, 1934 to 2026, one per document, oldest first."""
    return list(_speeches())


def facts() -> list[str]:
    """Short facts of one or two sentences, one per document; not all of them are true."""
    return list(_facts())


TEXTS: dict[str, Callable[[], list[str]]] = {"speeches": speeches, "facts": facts}


# --- phrases, and choosing among them ---


@cache
def phrases(task: str) -> dict[str, Any]:
    """The phrases of a task, read once from `builtin/<task>.yaml`."""
    import yaml  # here, as most importers of this module generate no rows

    return yaml.safe_load((DATA / f"{task}.yaml").read_text(encoding="utf-8"))


def _pick(rng: Random, choices: Sequence):
    # only random() gives the same numbers in every Python version; choice() does not promise to
    return choices[int(rng.random() * len(choices))]


def _is_held_out(key: str) -> bool:
    """Whether a word or a pair of numbers is in the test split, as about one in ten is."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10 == 0


@cache
def _words(split: str) -> tuple[str, ...]:
    words = (DATA / "words.txt").read_text(encoding="ascii").split()
    return tuple(word for word in words if _is_held_out(f"word {word}") == (split == "test"))


@cache
def pool_size(name: str, split: str) -> int | None:
    """How many words or pairs of numbers a split of a graded task has; None: it is not graded."""
    if name == "arithmetic":
        keys = (f"pair {a} {b}" for b in range(100) for a in range(b + 1))
        return sum(_is_held_out(key) == (split == "test") for key in keys)
    return len(_words(split)) if name in ("simple_spelling", "spelling_bee") else None


def _unused(used: set | None, draw: Callable[[], Any], key: Callable[[Any], Any]) -> Any:
    """Draw until the key is none of `used`, and add it; None: the first draw."""
    drawn = draw()
    while used is not None and key(drawn) in used:
        drawn = draw()
    if used is not None:
        used.add(key(drawn))
    return drawn


def _word(rng: Random, split: str, used: set | None) -> str:
    return _unused(used, lambda: _pick(rng, _words(split)), str)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _as_typed(rng: Random, question: str) -> str:
    """The question, one time in five lower-cased and without its end mark, as some people type."""
    return _normalized(question) if rng.random() < 0.2 else question


# --- spelling ---


def simple_spelling(rng: Random, split: str, used: set | None = None) -> list[Message]:
    """Spell one word, as in nanochat's SimpleSpelling: `apple` becomes `apple:a,p,p,l,e`."""
    word = _word(rng, split, used)
    return _exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")


QUOTES = ("", "", "'", '"')


def spelling_bee(rng: Random, split: str, used: set | None = None) -> list[Message]:
    """Count a letter in a word, spelling the word with a running count.

    The answer repeats the letter and the word on lines of their own; each further line holds one
    letter of the word and the count so far, so a tiny model only has to look one line back.
    """
    word = _word(rng, split, used)
    if rng.random() < 0.15:
        letter = _pick(rng, [x for x in "abcdefghijklmnopqrstuvwxyz" if x not in word])
    else:
        # otherwise two answers in three would be 1, and a model that always says 1 looks good
        repeated = [x for x in word if word.count(x) > 1]
        letter = _pick(rng, repeated if repeated and rng.random() < 0.4 else word)

    quote, word_quote = _pick(rng, QUOTES), _pick(rng, QUOTES)
    question = _pick(rng, phrases("spelling_bee")["questions"]).format(
        letter=quote + letter + quote,
        letters=f"{quote}{letter}{quote} letters" if quote else f"{letter}'s",
        word=word_quote + word + word_quote,
    )
    lines = [f"{seen}:{word[:at].count(letter)}" for at, seen in enumerate(word, start=1)]
    answer = "\n".join([f"Letter: {letter}", f"{word}:", *lines, f"#### {word.count(letter)}"])
    return _exchange(_as_typed(rng, question), answer)


# --- arithmetic ---


def _pair(rng: Random, split: str) -> tuple[int, int]:
    """Two numbers from 0 to 99 whose pair belongs to a split, small ones half of the time."""
    while True:
        limit = _pick(rng, (10, 20, 100, 100))
        a, b = int(rng.random() * limit), int(rng.random() * limit)
        # one key for both orders and both signs: 5 + 7 does not test a model that has seen 7 + 5
        if _is_held_out(f"pair {min(a, b)} {max(a, b)}") == (split == "test"):
            return a, b


def arithmetic(rng: Random, split: str, used: set | None = None) -> list[Message]:
    """Add or subtract two numbers from 0 to 99, small ones half of the time; never below zero."""
    a, b = _unused(used, lambda: _pair(rng, split), frozenset)
    if rng.random() < 0.5:
        questions, sign, result = phrases("arithmetic")["plus"], "+", a + b
    else:
        a, b = max(a, b), min(a, b)
        questions, sign, result = phrases("arithmetic")["minus"], "-", a - b
    question = _pick(rng, questions).format(a=a, b=b)
    return _exchange(question, f"{a} {sign} {b} = {result}\n#### {result}")


# --- identity ---


def _linked(rng: Random, question: str) -> str:
    link = _pick(rng, phrases("identity")["links"])
    return f"{link} {question[0].lower() + question[1:] if link == 'And' else question}"


def identity(rng: Random, split: str) -> list[Message]:
    """One to three turns in which the model introduces itself; both splits share the phrases."""
    lines = phrases("identity")
    turns = _pick(rng, (1, 1, 2, 2, 3))
    messages: list[Message] = []
    if turns > 1 and rng.random() < 0.2:
        messages += _exchange(
            _as_typed(rng, _pick(rng, lines["greetings"])), _pick(rng, lines["greeted"])
        )
    closes = turns - len(messages) // 2 > 1 and rng.random() < 0.15

    topics: list[str] = []
    for _ in range(turns - len(messages) // 2 - closes):
        left = [topic for topic in lines["topics"] if topic not in topics]
        # "who" comes up far more often than any other topic
        topics.append("who" if "who" in left and rng.random() < 0.35 else _pick(rng, left))
        topic = lines["topics"][topics[-1]]
        question = _pick(rng, topic["questions"])
        if not messages and rng.random() < 0.4:
            question = f"{_pick(rng, lines['greetings'])} {question}"
        elif messages and rng.random() < 0.4:
            question = _linked(rng, question)
        messages += _exchange(_as_typed(rng, question), _pick(rng, topic["answers"]))
    if closes:
        messages += _exchange(
            _as_typed(rng, _pick(rng, lines["thanks"])), _pick(rng, lines["welcomes"])
        )
    return messages


# --- small talk ---


def small_talk(rng: Random, split: str) -> list[Message]:
    """One to three turns of everyday talk; both splits share the phrases."""
    openings, everyday, closings = (
        phrases("small_talk")[part] for part in ("openings", "everyday", "closings")
    )
    turns = _pick(rng, (1, 2, 2, 3, 3))
    if turns == 1:
        parts = [_pick(rng, (openings, everyday, everyday, closings))]
    else:
        first, last = _pick(rng, (openings, everyday)), _pick(rng, (everyday, closings))
        parts = [first, everyday, last] if turns == 3 else [first, last]
    messages: list[Message] = []
    for part in parts:
        used = {_normalized(message["content"]) for message in messages}
        exchange = _pick(rng, [one for one in part if _normalized(one["user"]) not in used])
        question = _as_typed(rng, exchange["user"])
        messages += _exchange(question, _pick(rng, exchange["answers"]))
    return messages


def _normalized(text: str) -> str:
    return text.lower().rstrip("?.!")


TASKS: dict[str, Callable[..., list[Message]]] = {
    "identity": identity,
    "simple_spelling": simple_spelling,
    "spelling_bee": spelling_bee,
    "arithmetic": arithmetic,
    "small_talk": small_talk,
}


# --- rows, and grading answers ---


def text_rows(name: str) -> list[dict]:
    """Rows `{"text": ...}` of an embedded text, one per document.

    Args:
        name: a key of `TEXTS`.

    Raises:
        ValueError: if there is no such text.
    """
    _check_name("text", name, TEXTS)
    return [{"text": document} for document in TEXTS[name]()]


def task_rows(
    name: str, rows: int | None = None, split: str = "train", seed: int = 0
) -> list[dict]:
    """Rows `{"messages": [...]}` of a task, user and assistant alternating.

    Args:
        name: a key of `TASKS`.
        rows: how many; None: the task's number in `DEFAULT_ROWS`, or all if there are fewer. Only
            the test rows of a graded task have an upper bound, its `pool_size`.
        split: "train" or "test"; in graded tasks they share no word and no pair of numbers.
        seed: different seeds give different rows.

    Raises:
        ValueError: if there is no such task or split, or `rows` is negative or above the bound.
    """
    _check_name("task", name, TASKS)
    _check_name("split", split, SPLITS)
    pool = pool_size(name, split) if split == "test" else None
    if rows is None:
        rows = min(DEFAULT_ROWS[name], pool or DEFAULT_ROWS[name])
    if rows < 0:
        raise ValueError(f"rows must not be negative, not {rows}")
    if pool is not None and rows > pool:
        subjects = "pairs of numbers" if name == "arithmetic" else "words"
        raise ValueError(f"there are only {pool} held-out {subjects}, fewer than {rows} rows")
    unique = [] if pool is None else [set()]
    make = TASKS[name]
    return [
        {"messages": make(Random(f"{name}:{split}:{seed}:{row}"), split, *unique)}
        for row in range(rows)
    ]


def grade(name: str, row: dict, response: str) -> bool:
    """Whether a response answers the row's last user message correctly.

    simple_spelling requires the row's own answer, letter for letter; spelling_bee and arithmetic
    require the same number after the last `####`, whatever comes before it.

    Args:
        name: a graded task.
        row: as `task_rows` returns it; its last message is the reference answer.
        response: the model's text.

    Raises:
        ValueError: if there is no such task, or it is not graded.
    """
    _check_name("task", name, TASKS)
    answer = row["messages"][-1]["content"]
    if name == "simple_spelling":
        return response.strip() == answer
    if name in ("spelling_bee", "arithmetic"):
        number = _final_number(response)
        return number is not None and number == _final_number(answer)
    raise ValueError(
        f"task '{name}' has no right or wrong answers; the graded tasks are simple_spelling, "
        "spelling_bee and arithmetic"
    )


def _final_number(text: str) -> int | None:
    _, mark, tail = text.rpartition("####")
    # "3." ends a sentence, but "3.5" and "3,5" are not 3
    found = re.match(r"\s*(-?[0-9]+)(?![0-9]|[.,][0-9])", tail)
    return int(found[1]) if mark and found else None


def _check_name(kind: str, name: str, known: Sequence[str] | dict) -> None:
    if name in known:
        return
    import difflib  # slow to import, and only needed for the hint

    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"unknown {kind} '{name}'; {hint}")
