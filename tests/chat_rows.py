"""Conversations as rows: twenty short ones, a mixture of 400, and files that hold them."""

import csv
import io
import json
from pathlib import Path

import datasets

from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import encode_conversation


def conversation(question: str, answer: str = "Yes.") -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


CONVERSATIONS = [conversation(f"Question {number}?", f"Answer {number}.") for number in range(20)]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in rows]


def rendered(row: dict, tokenizer) -> str:
    return tokenizer.decode(encode_conversation(row["messages"], tokenizer)[0])


def all_rendered(tokenizer) -> list[str]:
    return sorted(rendered(row, tokenizer) for row in CONVERSATIONS)


def as_csv(rows: list[dict]) -> bytes:
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(["prompt", "completion"])
    writer.writerows([message["content"] for message in row["messages"]] for row in rows)
    return written.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    written = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(written)
    return written.getvalue()


def used_rows(train, tokenizer) -> list[str]:
    """The question of every example of a run, in order."""
    return [
        text.split("<|user_start|>")[1].split("<|user_end|>")[0]
        for text in texts_of(train, tokenizer)
    ]


def mixed(tmp_path: Path) -> list[Source]:
    """400 conversations in three sources; some are too long, ten are in two, one is malformed."""
    rows = [
        conversation(f"Question {n}?", f"Answer {n}." * (20 if n % 9 == 0 else 1))
        for n in range(400)
    ]
    first = write_jsonl(tmp_path / "first.jsonl", rows[:200])
    second = write_jsonl(tmp_path / "second.jsonl", [*rows[190:300], {"messages": []}])
    third = write_jsonl(tmp_path / "third.jsonl", rows[300:])
    return [Source(first), Source(second, repeat=2), Source(third)]


MIXED = {"max_length": 64, "on_too_long": "drop", "held_out": 30, "examples_per_step": 8}
