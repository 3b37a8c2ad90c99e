"""Hostile files and folders: each is an error that names it, or is read as it should be."""

import gzip
import io
import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
import zstandard
from chat_rows import CONVERSATIONS

from hfsft.cli import main
from hfsft.data.mixture import load_conversations
from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import encode_conversation

LINES = b"".join(json.dumps(row).encode() + b"\n" for row in CONVERSATIONS)


def parquet(rows: list[dict] | datasets.Dataset) -> bytes:
    written = io.BytesIO()
    rows = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    rows.to_parquet(written)
    return written.getvalue()


def parquet_table(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pa.parquet.write_table(table, written)
    return written.getvalue()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


PARQUET = parquet(CONVERSATIONS)
# Arrow does not check a text's encoding when it is written
LATIN_1 = pa.StringArray.from_buffers(
    1, pa.py_buffer(np.array([0, 4], np.int32)), pa.py_buffer(b"caf\xe9")
)
PARQUET_IN_LATIN_1 = parquet_table(pa.table({"prompt": LATIN_1, "completion": ["Hello"]}))
PAIRS = b"prompt,completion\n" + b"Hi,Hello\n" * 20
# the files in the folder, the source's path in it, and how the message continues after that path;
# empty where several causes are possible
BAD_FILES = {
    "utf-16": ({"r.jsonl": LINES.decode().encode("utf-16")}, "r.jsonl", "not UTF-8 text (line 1)"),
    "utf-16 without a mark": (
        {"r.jsonl": LINES.decode().encode("utf-16-le")},
        "r.jsonl",
        "no row is a JSON object",
    ),
    "utf-32": ({"r.jsonl": LINES.decode().encode("utf-32")}, "r.jsonl", "not UTF-8 text (line 1)"),
    "latin-1 in the third row": (
        {"r.jsonl": LINES.replace(b"Answer 2.", b"caf\xe9")},
        "r.jsonl",
        "not UTF-8 text (line 3)",
    ),
    "utf-16 list": (
        {"r.json": json.dumps([CONVERSATIONS[0]]).encode("utf-16")},
        "r.json",
        "not UTF-8 text",
    ),
    "utf-16 csv": ({"r.csv": PAIRS.decode().encode("utf-16")}, "r.csv", "cannot be read:"),
    "latin-1 csv": ({"r.csv": PAIRS + b"caf\xe9,x\n"}, "r.csv", "cannot be read:"),
    "latin-1 text": ({"r.txt": b"caf\xe9"}, "r.txt", "cannot be read:"),
    "blank lines alone": ({"r.jsonl": b"\n \n\n"}, "r.jsonl", "has no rows"),
    "a mapping of rows": (
        {"r.json": json.dumps({"a": CONVERSATIONS[0]}).encode()},
        "r.json",
        "is not a list of rows",
    ),
    "a list that ends early": (
        {"r.json": json.dumps([CONVERSATIONS[0]]).encode()[:-4]},
        "r.json",
        "not a JSON list of rows: ",
    ),
    "a list of 10,000 levels": (
        {"r.json": b"[" * 10_000 + b"]" * 10_000},
        "r.json",
        "not a JSON list of rows: ",
    ),
    "a list of texts": ({"r.json": b'["Hi", "Hello"]'}, "r.json", "no row is a JSON object"),
    "gzip under a plain name": (
        {"r.jsonl": gzip.compress(LINES)},
        "r.jsonl",
        "not UTF-8 text (line 1)",
    ),
    "gzip of nothing": ({"r.jsonl.gz": gzip.compress(b"")}, "r.jsonl.gz", "has no rows"),
    "an empty gzip": ({"r.jsonl.gz": b""}, "r.jsonl.gz", "has no rows"),
    "gzip with a wrong sum": (
        {"r.jsonl.gz": gzip.compress(LINES)[:-8] + b"\0" * 8},
        "r.jsonl.gz",
        "cannot be read: ",
    ),
    "gzip broken inside": (
        {"r.json.gz": gzip.compress(LINES)[:60] + b"\xff" * 60},
        "r.json.gz",
        "cannot be read: ",
    ),
    "zstandard of other bytes": (
        {"r.jsonl.zst": b"hello there"},
        "r.jsonl.zst",
        "cannot be read: ",
    ),
    "half a zstandard list": (
        {
            "r.json.zst": zstandard.ZstdCompressor().compress(
                json.dumps([CONVERSATIONS[0]]).encode()
            )[:30]
        },
        "r.json.zst",
        "",
    ),
    "half a zstandard csv": (
        {"r.csv.zst": zstandard.ZstdCompressor().compress(PAIRS)[:20]},
        "r.csv.zst",
        "cannot be read: ",
    ),
    "parquet broken inside": (
        {"r.parquet": PARQUET[:100] + b"\xff" * 200 + PARQUET[300:]},
        "r.parquet",
        "cannot be read: ",
    ),
    "parquet of other columns": (
        {"r.parquet": parquet([{"a.b": "x", "": 1}])},
        "r.parquet",
        "cannot tell the format from its columns a.b, ",
    ),
    "parquet without rows": (
        {"r.parquet": parquet(datasets.Dataset.from_list([CONVERSATIONS[0]]).select([]))},
        "r.parquet",
        "has no rows",
    ),
    "JSON under parquet's name": ({"r.parquet": LINES}, "r.parquet", "cannot be read: "),
    "parquet under JSON's name": ({"r.jsonl": PARQUET}, "r.jsonl", "not UTF-8 text (line "),
    "csv with a longer row": ({"r.csv": PAIRS + b"a,b,c\n"}, "r.csv", "cannot be read: "),
    "csv with an open quote": ({"r.csv": PAIRS + b'"a,b\n'}, "r.csv", "cannot be read: "),
    "csv with a column twice": (
        {"r.csv": PAIRS.replace(b"completion", b"prompt")},
        "r.csv",
        "cannot tell the format from its columns prompt, prompt.1",
    ),
    "gzip under a plain csv's name": (
        {"r.csv": gzip.compress(PAIRS)},
        "r.csv",
        "cannot be read: is packed as gzip, unlike its name",
    ),
    "a tar under a text's name": (
        {"r.txt": b"\0" * 10_240},
        "r.txt",
        "cannot be read: is packed as tar, unlike its name",
    ),
    "a plain csv under gzip's name": (
        {"r.csv.gz": PAIRS},
        "r.csv.gz",
        "cannot be read: is not packed, unlike its name",
    ),
    "a folder named as a file": ({"r.jsonl/inside.xyz": b""}, "r.jsonl", "cannot be read: "),
    "a folder among the files": (
        {"a.jsonl": LINES, "b.jsonl/inside.xyz": b""},
        "*.jsonl",
        "b.jsonl is not a file",
    ),
    "a FIFO": ({"r.jsonl": os.mkfifo}, "r.jsonl", "no such file"),
    "a FIFO among parquet files": (
        {"a.parquet": PARQUET, "b.parquet": os.mkfifo},
        "*.parquet",
        "b.parquet is not a file",
    ),
    "a FIFO among the files": (
        {"a.jsonl": LINES, "b.jsonl": os.mkfifo},
        "*.jsonl",
        "b.jsonl is not a file",
    ),
    "a link to itself": ({"r.jsonl": link_to_itself}, "r.jsonl", "no such file"),
    "a link to itself among the files": (
        {"a.jsonl": LINES, "b.jsonl": link_to_itself},
        "*.jsonl",
        "b.jsonl is not a file",
    ),
    "a device": ({}, "/dev/zero", "no such file"),
    "a folder of half a file": ({"r/a.parquet": PARQUET[:700]}, "r", "cannot be read: "),
    "a saved dataset without its rows": ({"r/state.json": b"{"}, "r", "cannot be read: "),
    "a saved dataset's broken splits": ({"r/dataset_dict.json": b"{"}, "r", "cannot be read: "),
    "a long name": ({}, "r" * 300 + ".jsonl", "no such file"),
    "a long name among the folders": ({}, "r" * 300 + "/*.jsonl", "no file matches"),
    "a folder of deep rows": (
        {"r/a.jsonl": b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"},
        "r",
        "no row is a JSON object",
    ),
    "a folder of a deep list": (
        {"r/a.json": b"[" * 10_000 + b"]" * 10_000},
        "r",
        "a.json: not a JSON list of rows: ",
    ),
    "a folder of latin-1 rows": (
        {"r/a.jsonl": LINES, "r/b.jsonl": LINES.replace(b"Answer 2.", b"caf\xe9")},
        "r",
        "b.jsonl: not UTF-8 text (line 3)",
    ),
    "a folder of half a zipped list": (
        {"r/a.json.gz": gzip.compress(LINES)[:30]},
        "r",
        "cannot be read: ",
    ),
    "a folder of csv files that differ": (
        {"r/a.csv": PAIRS, "r/b.csv": PAIRS.replace(b"completion", b"answer")},
        "r",
        "its files differ in their columns",
    ),
    "a folder of parquet files that differ": (
        {"r/a.parquet": PARQUET, "r/b.parquet": parquet([{"messages": "Hi"}])},
        "r",
        "its files differ in their columns",
    ),
    "a folder of a csv's header": (
        {"r/a.csv": b"prompt,completion\n"},
        "r",
        "has no rows",
    ),
    "a folder of a script": ({"r/r.py": b"print('Hi')"}, "r", "cannot be read: "),
    "a saved dataset's state a list": (
        {"r/state.json": b"[]", "r/dataset_info.json": b"{}"},
        "r",
        "cannot be read: ",
    ),
    "a saved dataset's description a list": (
        {"r/state.json": b"{}", "r/dataset_info.json": b"[]"},
        "r",
        "cannot be read: ",
    ),
    "latin-1 in parquet": (
        {"r.parquet": PARQUET_IN_LATIN_1},
        "r.parquet",
        "has text that is not UTF-8",
    ),
    "csv files that differ": (
        {"a.csv": PAIRS, "b.csv": PAIRS.replace(b"completion", b"answer")},
        "*.csv",
        "its files differ in their columns",
    ),
    "parquet of our columns": (
        {"r.parquet": parquet([{"hfsft_json": json.dumps(CONVERSATIONS[0]), "hfsft_row": 7}])},
        "r.parquet",
        "has no rows",
    ),
    "a missing file": ({}, "r.jsonl", "no such file"),
    "a missing folder": ({}, "r/", "no such file"),
    "a glob of nothing": ({"r.jsonl": LINES}, "*.parquet", "no file matches"),
    "a glob of two kinds": (
        {"a.jsonl": LINES, "b.parquet": PARQUET},
        "*",
        "matches files of several kinds: .jsonl, .parquet",
    ),
}


@pytest.fixture
def hfsft_data(tmp_path, tokenizer, monkeypatch, capsys):
    """Runs `hfsft data` on a source: its exit status and standard error."""

    def run(path: Path) -> tuple[int, str]:
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text("{}")
        sft = {"model_name_or_path": str(tmp_path / "model"), "data": [{"path": str(path)}]}
        sft |= {"held_out": 0, "max_length": 64, "max_steps": 1}
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "sft": sft})
        )
        monkeypatch.setattr(sys, "argv", ["hfsft", "data", str(tmp_path / "recipe.yaml")])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_an_error_that_names_it(case, tmp_path, hfsft_data, caplog):
    files, name, message = BAD_FILES[case]
    folder = tmp_path / "data"
    folder.mkdir()
    for inside, content in files.items():
        (folder / inside).parent.mkdir(exist_ok=True)
        if callable(content):
            content(folder / inside)
        else:
            (folder / inside).write_bytes(content)
    status, printed = hfsft_data(folder / name)
    assert status == 2, printed
    assert printed.startswith(f"hfsft: {folder / name}: {message}")
    assert len(printed.splitlines()) <= 2 and len(printed) < 700
    assert not caplog.records  # datasets logs what it raises, too


def test_a_file_may_have_any_name(tmp_path, make_stage, tokenizer):
    for name in ("r[1] é\t.jsonl", "a\nb.jsonl", "*.jsonl", "~.jsonl", " .jsonl"):
        (tmp_path / name).write_bytes(LINES)
        train, _ = load_conversations(make_stage(str(tmp_path / name), name="mid"), tokenizer)
        assert len(train) == 20


def test_csv_cells_are_read_as_text(tmp_path, make_stage, tokenizer):
    pairs = [
        ("2+2?", "4"),
        ("Is it?", "True"),
        ("Which?", "None"),
        ("Who?", "NA"),
        ("1.50", "null"),
    ]
    lines = [f"{prompt},{completion}\n" for prompt, completion in pairs]
    (tmp_path / "r.csv").write_text("prompt,completion\n" + "".join(lines) + "Empty?,\nShort?\n")
    stage = make_stage(str(tmp_path / "r.csv"), name="mid", on_bad_rows="skip")
    train, _ = load_conversations(stage, tokenizer)
    expected = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in pairs
    ]
    assert train["input_ids"][:] == [encode_conversation(one, tokenizer)[0] for one in expected]
    assert [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()] == [
        {"source": str(tmp_path / "r.csv"), "row": row, "reason": "empty content"} for row in (5, 6)
    ]


@pytest.mark.parametrize("first", [b"{}", b'{"id": 1}', b"[]", b'{"id": 1}\n{"id": 2}'])
def test_bad_first_rows_do_not_hide_the_format(first, tmp_path, make_stage, tokenizer):
    (tmp_path / "r.jsonl").write_bytes(first + b"\n" + LINES)
    stage = make_stage(str(tmp_path / "r.jsonl"), name="mid", on_bad_rows="skip")
    assert len(load_conversations(stage, tokenizer)[0]) == 20


def test_a_folder_s_json_is_read_split_by_split(tmp_path, make_stage, tokenizer):
    rows = CONVERSATIONS
    mixed = [rows[0] | {"id": 1}, rows[1] | {"id": "x", "more": [2]}, *rows[2:]]
    (tmp_path / "README.md").write_text("A dataset.")
    (tmp_path / "train-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed[:9]))
    (tmp_path / "train-2.json").write_text(json.dumps(mixed[9:12]))
    (tmp_path / "train-3.json").write_text("".join(json.dumps(row) + "\n" for row in mixed[12:]))
    (tmp_path / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1] * 3)
    for split, count in (("train", 20), ("test", 3)):
        stage = make_stage(Source(str(tmp_path), split=split), name="mid", duplicates="keep")
        assert len(load_conversations(stage, tokenizer)[0]) == count


def test_a_file_reached_through_links_is_read_once(tmp_path, make_stage, tokenizer):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "r.jsonl").write_bytes(LINES)
    (tmp_path / "inside" / "up").symlink_to(tmp_path)
    stage = make_stage(str(tmp_path / "**" / "*.jsonl"), name="mid")
    assert len(load_conversations(stage, tokenizer)[0]) == 20


def test_columns_with_our_names_are_dropped(tmp_path, make_stage, tokenizer):
    rows = [CONVERSATIONS[number] | {"hfsft_json": "[]", "hfsft_row": 7} for number in range(20)]
    (tmp_path / "r.parquet").write_bytes(parquet([*rows, {"messages": []}]))
    stage = make_stage(str(tmp_path / "r.parquet"), name="mid", on_bad_rows="skip")
    assert len(load_conversations(stage, tokenizer)[0]) == 20
    (refused,) = (json.loads(line) for line in (stage.folder / "rejected.jsonl").open())
    assert refused["row"] == 20
