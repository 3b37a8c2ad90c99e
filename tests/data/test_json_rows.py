"""Lines and lists of JSON in bounded memory: blank lines, long ones, bombs, lists cut anywhere."""

import io
import json
import random
import tracemalloc

import pytest
import zstandard

from hfsft.data import json_rows
from hfsft.data.json_rows import RowTooLong, bounded_lines, list_items
from hfsft.data.mixture import load_conversations
from hfsft.data.sources import LONGEST_GAP, load_rows
from hfsft.errors import DataError
from hfsft.recipe.schema import Source


def pair(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": "Yes."}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_lines_whatever_the_block(block, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", block)
    rng = random.Random(block)
    for _ in range(200):
        lines = [b"x" * rng.choice((0, 0, 1, 4, 5, 6, 30)) for _ in range(rng.randrange(8))]
        data = b"\n".join(lines)
        expected = [
            (number, line if len(line) <= 5 else None)
            for number, line in enumerate(lines, 1)
            if line
        ]
        assert list(bounded_lines(io.BytesIO(data), 5)) == expected, data


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
def test_a_list_whatever_the_block(block, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", block)
    for rows in ([], [1], [12, -3.5e10, None, "é,]", {"a": [1, "]"]}], [[[]], {}], ["x" * 50]):
        for indent in (None, 2):
            text = " " + json.dumps(rows, indent=indent) + "\n"
            assert list(list_items(io.BytesIO(text.encode()), 100)) == rows
            opened = io.BytesIO(b"\xef\xbb\xbf" + text.encode())
            assert list(list_items(opened, 100)) == rows


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1}', TypeError),
        ("3", TypeError),
        ("[1, 2", ValueError),
        ("[1 2]", ValueError),
        ("[1,]", ValueError),
        ("[,1]", ValueError),
        ("[1] x", ValueError),
        ("", ValueError),
        ('["' + "x" * 200, RowTooLong),
        ("[" * 100_000, RecursionError),
    ],
)
def test_what_is_no_list_of_rows(text, error):
    with pytest.raises(error):
        list(list_items(io.BytesIO(text.encode()), 100))


def test_a_long_line_is_refused_and_counted(tmp_path, make_stage, tokenizer):
    path = tmp_path / "r.jsonl"
    rows = [pair("Hi"), pair("x" * 5000), pair("Ho")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = make_stage(
        Source(str(path), max_row_bytes=1000), name="mid", on_bad_rows="skip", max_length=4096
    )
    train, _ = load_conversations(stage, tokenizer)
    assert len(train) == 2
    (refused,) = [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()]
    assert refused == {
        "source": str(path),
        "row": 1,
        "reason": "longer than max_row_bytes (1,000)",
    }
    raised = make_stage(Source(str(path), max_row_bytes=6000), name="mid", max_length=8192)
    assert len(load_conversations(raised, tokenizer)[0]) == 3


def test_a_long_row_of_a_list_is_an_error_that_names_the_key(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([pair("Hi"), pair("x" * 3_000_000)]))
    with pytest.raises(
        DataError, match=r"row 1 is longer than 1,000 char.*\n.*raise max_row_bytes"
    ):
        load_rows(Source(str(path), max_row_bytes=1000), 0)


def test_memory_does_not_follow_a_line(tmp_path):
    path, size = tmp_path / "r.jsonl.zst", 80 << 20  # some kilobytes compressed
    packer = zstandard.ZstdCompressor(level=1)
    with path.open("wb") as file, packer.stream_writer(file) as packed:
        packed.write(json.dumps(pair("Hi")).encode() + b"\n")
        for inside in (b"x" * (1 << 20), b"\n" * (1 << 20)):
            for _ in range(size >> 20):
                packed.write(inside)
        packed.write(json.dumps(pair("Ho")).encode())
    assert path.stat().st_size < 100_000
    with zstandard.open(path, "rb") as opened:
        tracemalloc.start()
        lines = list(bounded_lines(opened, 8 << 20))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert [(number, line and line[:13]) for number, line in lines] == [
        (1, b'{"prompt": "H'),
        (2, None),
        (size + 2, b'{"prompt": "H'),
    ]
    assert peak < 40 << 20


def test_a_gap_of_spaces_never_reaches_the_tokenizer(tmp_path, make_stage, tokenizer):
    path = tmp_path / "r.jsonl"
    gaps = [" " * 10_000_000, "\n" * (LONGEST_GAP + 1), " \t" * 400_000]
    rows = [pair(f"a{gap}b") for gap in gaps] + [pair("a" + " " * 1000 + "b"), pair("Hi")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = make_stage(str(path), name="mid", on_bad_rows="skip", max_length=4096)
    train, _ = load_conversations(stage, tokenizer)
    assert len(train) == 2
    refused = [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()]
    assert [(entry["row"], entry["reason"]) for entry in refused] == [
        (row, "more than 500,000 spaces in a row") for row in range(3)
    ]
