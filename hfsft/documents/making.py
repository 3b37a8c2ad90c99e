"""`hfsft make-data`: documents to rows, resumable answer by answer.

Every answer of the teacher is kept under a digest of its request, and the rows are made from the
answers in the order of the documents: a run that was interrupted asks for what is missing alone,
and ends with the rows of one that was not.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import track

from hfsft.documents.checking import (
    Refused,
    answer_of,
    question_key,
    question_of,
    require_no_phrase,
    require_run,
    require_supported,
)
from hfsft.documents.cutting import Passage, passages
from hfsft.documents.prompts import Messages, Prompts
from hfsft.documents.reading import MADE, read_folder
from hfsft.documents.teacher import Answer, NoAnswer, Teacher, request_body
from hfsft.errors import DataError, HfsftError, Interrupted
from hfsft.process import Stopped
from hfsft.run.disk import writing_to
from hfsft.run.files import read_json_lines, write_text_atomically
from hfsft.terminal import Terminal

SHORTEST = 200  # characters of a passage that a question can be asked about

FAILURES = 3  # rows in a row without an answer, after which the teacher is not asked again

DUPLICATE = "the same question as an earlier row"

Row = dict[str, Any]


@dataclass(frozen=True)
class Making:
    """What to make of the documents.

    Args:
        passage_chars: characters of a passage at most.
        rows_per_passage: rows to ask for.
        max_passages: a seeded sample of so many passages; None: all.
        coverage: share of an answer's words that its passage must have; half of it in a question.
        seed: of the sample, and of the teacher's sampling.
        concurrency: requests at a time.
        quiet: without a progress bar.
    """

    passage_chars: int = 3000
    rows_per_passage: int = 3
    max_passages: int | None = None
    coverage: float = 0.6
    seed: int = 42
    concurrency: int = 1
    quiet: bool = False


# --- the files ---


class Output:
    """The file of rows, and beside it a folder of what it was made from."""

    def __init__(self, path: Path, overwrite: bool):
        """Check that the rows may be written.

        Args:
            path: the file of rows, a .jsonl.
            overwrite: whether to replace a file that is not as it was written here.

        Raises:
            DataError: if there is such a file.
        """
        if path.suffix != ".jsonl":
            raise DataError(f"-o {path}: the rows are JSON lines, and their file ends in .jsonl")
        if path.is_dir():
            raise DataError(f"-o {path}: is a folder")
        self.path, self.folder = path, path.with_name(path.stem + MADE)
        self.counts = self.folder / "counts.json"
        self.answers = self.folder / "answers.jsonl"
        self.refused = self.folder / "refused.jsonl"
        if path.exists() and not overwrite and self._written() != _digest(path.read_bytes()):
            raise DataError(
                f"{path} exists, and is not as hfsft wrote it\n"
                "  Pass another file with -o, or --overwrite to replace this one"
            )

    def _written(self) -> str | None:
        """The digest of the rows that were last written, if any were."""
        try:
            return json.loads(self.counts.read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from making the same rows."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be created: {error.strerror}") from None
        with writing_to(self.path.parent):
            lock = FileLock(self.folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise DataError(f"{self.path}: another process is making it") from None
            with lock:
                yield

    def write(self, rows: list[Row], refused: list[Row], counts: dict[str, Any]) -> None:
        """Write the rows, the refused ones, and the counts last."""
        text = _json_lines(rows)
        write_text_atomically(self.path, text)
        write_text_atomically(self.refused, _json_lines(refused))
        counts = counts | {"digest": _digest(text.encode())}
        write_text_atomically(self.counts, json.dumps(counts, indent=1, ensure_ascii=False) + "\n")


class Answers:
    """The teacher's answers by the digest of their request, each on disk before it is used."""

    def __init__(self, path: Path):
        """Read the answers so far; a line that a kill left half written is asked for again."""
        self.path, self.by_key = path, {}
        for line in read_json_lines(path):
            key, text = line.get("key"), line.get("text")
            if isinstance(key, str) and isinstance(text, str):
                self.by_key[key] = Answer(text, line.get("cut_off") is True)
        self.writing = threading.Lock()
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            self._append("\n")

    def get(self, body: dict[str, Any], ask: Callable[[dict[str, Any]], Answer]) -> Answer:
        """The answer to a request, asked for if there is none yet."""
        key = _digest(json.dumps(body, sort_keys=True).encode())
        if key not in self.by_key:
            answer = ask(body)
            line = {"key": key, "text": answer.text, "cut_off": answer.cut_off}
            with self.writing:
                self._append(json.dumps(line, ensure_ascii=False) + "\n")
                self.by_key[key] = answer
        return self.by_key[key]

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _json_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# --- without a teacher ---


def make_text(folder: Path, output: Output, making: Making) -> dict[str, Any]:
    """Cut the documents of a folder into rows of base text.

    Args:
        folder: the documents.
        output: where the rows go.
        making: the length of a passage, and how many.

    Returns:
        Counts: `documents`, `unread` files with reasons, `passages`, `duplicates`, `rows`.
    """
    with output.locked():
        cut, counts = _cut(folder, making)
        rows = [{"text": passage.text, "source": passage.source()} for passage in cut]
        counts |= {"rows": len(rows)}
        output.write(rows, [], counts)
    return counts


def _cut(folder: Path, making: Making) -> tuple[list[Passage], dict[str, Any]]:
    """The distinct passages of a folder's documents, and what became of the rest."""
    documents, unread = read_folder(folder)
    first: dict[str, Passage] = {}
    count = 0
    for document in documents:
        for passage in passages(document, making.passage_chars):
            first.setdefault(" ".join(passage.text.split()), passage)
            count += 1
    cut = list(first.values())
    counts = {
        "documents": len(documents),
        "unread": unread,
        "passages": count,
        "duplicates": count - len(cut),
    }
    return _sample(cut, making), counts


def _sample(cut: list[Passage], making: Making) -> list[Passage]:
    if making.max_passages is None or making.max_passages >= len(cut):
        return cut
    kept = random.Random(f"{making.seed}:passages").sample(range(len(cut)), making.max_passages)
    return [cut[index] for index in sorted(kept)]


# --- with a teacher ---


def make_conversations(
    folder: Path, output: Output, making: Making, prompts: Prompts, reach: Callable[[], Teacher]
) -> dict[str, Any]:
    """Let a teacher write questions about the documents of a folder, and the answers.

    Args:
        folder: the documents.
        output: where the rows go, and the answers they are made from.
        making: how many rows, of which passages, and how they are checked.
        prompts: what to ask.
        reach: makes the teacher, once the documents are read.

    Returns:
        Counts: those of `make_text`, `too_short` passages, `asked` rows, and `refused` and
        `no_answer`, each reason → rows.

    Raises:
        HfsftError: if the teacher stops answering; what it answered is kept.
    """
    with output.locked():
        cut, counts = _cut(folder, making)
        long = [passage for passage in cut if len(passage.text) >= SHORTEST]
        counts["too_short"] = len(cut) - len(long)
        asked = [(passage, row) for passage in long for row in range(making.rows_per_passage)]
        counts["asked"] = len(asked)
        answers = Answers(output.answers)
        writer = Writer(reach(), prompts, making, answers)
        with _told_how_to_resume(answers):
            outcomes = writer.outcomes(asked)
        rows, refused, no_answer = _distinct(outcomes)
        counts |= {
            "refused": dict(Counter(row["reason"] for row in refused).most_common()),
            "no_answer": dict(no_answer.most_common()),
            "rows": len(rows),
        }
        output.write(rows, refused, counts)
    return counts


@contextmanager
def _told_how_to_resume(answers: Answers) -> Iterator[None]:
    """Say of an interruption or a failing teacher what is kept."""

    def kept() -> str:
        return f"\n  {len(answers.by_key):,} answers are kept; the same command resumes"

    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        number = getattr(stop, "number", signal.SIGINT)
        raise Interrupted(f"stopped by {signal.Signals(number).name}{kept()}", number) from None
    except HfsftError as error:
        raise HfsftError(f"{error}{kept()}") from None


class Writer:
    """Makes rows of passages with a teacher's answers."""

    def __init__(self, teacher: Teacher, prompts: Prompts, making: Making, answers: Answers):
        self.teacher, self.prompts, self.making, self.answers = teacher, prompts, making, answers

    def outcomes(self, asked: list[tuple[Passage, int]]) -> list[Row]:
        """A row, or why there is none, for each that is asked for, in order.

        Raises:
            HfsftError: after `FAILURES` in a row without an answer.
        """
        pool = ThreadPoolExecutor(self.making.concurrency)
        # in this thread, an interruption does not wait for the answer that is under way
        alone = self.making.concurrency == 1
        made = map(self.outcome, asked) if alone else pool.map(self.outcome, asked)
        quiet = self.making.quiet or not sys.stderr.isatty()
        bar = {"console": Terminal(stderr=True), "transient": True, "disable": quiet}
        outcomes, failed = [], 0
        try:
            for outcome in track(made, "rows", len(asked), **bar):
                failed = failed + 1 if "no_answer" in outcome else 0
                if failed == FAILURES:
                    raise HfsftError(
                        f"no answer from {self.teacher.url} for {failed} rows in a row: "
                        f"{outcome['no_answer']}"
                    )
                outcomes.append(outcome)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return outcomes

    def outcome(self, asked: tuple[Passage, int]) -> Row:
        """The row of a passage with this number, or why there is none.

        Returns:
            `messages` and `source`; or `reason`, with what the teacher wrote; or `no_answer`.
        """
        passage, number = asked
        entry: Row = {"source": passage.source()}
        try:
            question = self.prompts.given(passage.text, number)
            if question is None:
                question = self._question(passage, number, entry)
                answer = self._answer(passage, number, question, entry)
            else:
                messages = self.prompts.for_given(question)
                answer = self._checked(messages, passage, number, "", entry)
        except NoAnswer as problem:
            return {"no_answer": str(problem)}
        except Refused as problem:
            return entry | {"reason": str(problem)}
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "source": entry["source"]}

    def _question(self, passage: Passage, number: int, entry: Row) -> str:
        prompts, text = self.prompts, passage.text
        wrote = self._ask(prompts.for_question(text, number), passage, number)
        entry["question"] = wrote.text
        if wrote.cut_off:
            raise Refused("a question that was cut off at max_tokens")
        question = question_of(wrote.text)
        require_no_phrase(question, prompts.refusals, text, "the teacher refused")
        require_no_phrase(question, prompts.unclear, text, "needs the passage to be understood")
        # half: the words of asking, such as "what is the difference between", are not its subject
        require_supported(question, text, self.making.coverage / 2, "question")
        return question

    def _answer(self, passage: Passage, number: int, question: str, entry: Row) -> str:
        prompts, text = self.prompts, passage.text
        messages = prompts.for_answer(text, question)
        answer = self._checked(messages, passage, number, question, entry)
        require_no_phrase(answer, prompts.unclear, text, "needs the passage to be understood")
        return answer

    def _checked(
        self, messages: Messages, passage: Passage, number: int, question: str, entry: Row
    ) -> str:
        """An answer that stands in its passage; `question` is "" where the row gives it."""
        wrote = self._ask(messages, passage, number)
        entry["answer"] = wrote.text
        if wrote.cut_off:
            raise Refused("an answer that was cut off at max_tokens")
        answer = answer_of(wrote.text)
        require_no_phrase(answer, self.prompts.refusals, passage.text, "the teacher refused")
        require_supported(answer, passage.text, self.making.coverage, "answer")
        require_run(answer, passage.text, question)
        return answer

    def _ask(self, messages: Messages, passage: Passage, number: int) -> Answer:
        # of the passage itself, so that a document more or less changes no other row
        key = _digest(f"{self.making.seed}:{number}:{passage.text}".encode())
        seed = int(key[:8], 16) >> 1  # servers take 31 bits
        body = request_body(self.teacher.model, messages, seed, self.prompts.request)
        return self.answers.get(body, self.teacher.ask)


def _distinct(outcomes: list[Row]) -> tuple[list[Row], list[Row], Counter]:
    """The rows with distinct questions, the refused ones, and the reasons for no answer."""
    rows, refused, no_answer = [], [], Counter()
    seen: set[tuple[str, ...]] = set()
    for outcome in outcomes:
        if "no_answer" in outcome:
            no_answer[outcome["no_answer"]] += 1
        elif "reason" in outcome:
            refused.append(outcome)
        else:
            question, answer = (message["content"] for message in outcome["messages"])
            if (key := question_key(question)) in seen:
                wrote = {"question": question, "answer": answer}
                refused.append({"source": outcome["source"], **wrote, "reason": DUPLICATE})
                continue
            seen.add(key)
            rows.append(outcome)
    return rows, refused, no_answer
