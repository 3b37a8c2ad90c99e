"""Hostile rows and files: each is refused by name and reason, and none of it is trained on."""

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

from hfsft.cli import main
from hfsft.data import encoded
from hfsft.data.mixture import load_conversations
from hfsft.data.text import load_text
from hfsft.errors import DataError
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import encode_conversation

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def chat(number: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": f"Answer {number}."},
        ]
    }


def turns(*contents) -> bytes:
    roles = ("user", "assistant")
    return json.dumps(
        {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}
    ).encode()


def row(messages, **more) -> bytes:
    return json.dumps({"messages": messages} | more).encode()


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# --- rows ---

# the line of a .jsonl file, and why it is refused
BAD_ROWS = {
    "a list": (b'["user", "Hi"]', "not a JSON object"),
    "a list of messages": (json.dumps([USER, ASSISTANT]).encode(), "not a JSON object"),
    "a text": (b'"Hi"', "not a JSON object"),
    "another format": (b'{"prompt": "Hi", "completion": "Hello"}', "not a row of format messages"),
    "null": (b"null", "not a JSON object"),
    "NaN": (b"NaN", "not a JSON object"),
    "an empty mapping": (b"{}", "not a row of format messages"),
    "two rows on a line": (turns("Hi", "Hello") * 2, "not JSON"),
    "half a row": (turns("Hi", "Hello")[:-9], "not JSON"),
    "single quotes": (b"{'messages': []}", "not JSON"),
    "a NUL between rows": (b"\0", "not JSON"),
    "a raw NUL in a text": (turns("Hi", "Hello").replace(b"Hello", b"Hel\0lo"), "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + turns("Hi", "Hello"), "not JSON"),
    "10,000 levels": (b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "not JSON"),
    "10,000 levels beside": (
        turns("Hi", "Hello")[:-1] + b', "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        "not JSON",
    ),
    "10,000 digits": (turns("Hi", "Hello")[:-1] + b', "x": ' + b"9" * 10_000 + b"}", "not JSON"),
    "messages twice": (turns("Hi", "Hello")[:-1] + b', "messages": null}', "no messages"),
    "messages a mapping": (row({"0": USER, "1": ASSISTANT}), "no messages"),
    "messages a number": (row(5), "no messages"),
    "messages as JSON text": (row(json.dumps([USER, ASSISTANT])), "no messages"),
    "messages NaN": (b'{"messages": NaN}', "no messages"),
    "nested messages": (row([[USER, ASSISTANT]]), "a message that is not a mapping"),
    "a null message": (row([USER, None, ASSISTANT]), "a message that is not a mapping"),
    "role of other case": (row([USER, {"role": "Assistant", "content": "x"}]), "unknown role"),
    "role with a space": (row([USER, {"role": "assistant ", "content": "x"}]), "unknown role"),
    "role null": (row([{"role": None, "content": "Hi"}, ASSISTANT]), "unknown role"),
    "role number": (row([{"role": 0, "content": "Hi"}, ASSISTANT]), "unknown role"),
    "role of a special token": (
        row([{"role": "user<|user_end|>", "content": "Hi"}, ASSISTANT]),
        "unknown role",
    ),
    "content true": (turns("Hi", True), "content that is not text"),
    "content a number": (turns(0, "Hello"), "content that is not text"),
    "content NaN": (turns("Hi", float("nan")), "content that is not text"),
    "content infinite": (turns("Hi", float("-inf")), "content that is not text"),
    "content a mapping": (turns("Hi", {"text": "Hello"}), "content that is not text"),
    "content a nested list": (turns("Hi", [["Hello"]]), "content that is not text"),
    "content a list of texts": (turns("Hi", ["Hello"]), "content that is not text"),
    "content a list of nulls": (turns("Hi", [None]), "content that is not text"),
    "content of ideographic spaces": (turns("Hi", "\u3000\u2003\u00a0\n"), "empty content"),
    "content of an empty part": (turns("Hi", [{"type": "text", "text": ""}]), "empty content"),
    "a part without text": (
        turns("Hi", [{"type": "text", "value": "hi"}]),
        "content that is not text",
    ),
    "a part of a number": (turns([{"type": "text", "text": 5}], "Hi"), "content that is not text"),
    "a part of type list": (turns("Hi", [{"type": [], "text": "x"}]), "content that is not text"),
    "an image": (row([USER, ASSISTANT], images=["a.png"]), "has images, video or audio"),
    "a sound": (row([USER, ASSISTANT], audio={"path": "a.wav"}), "has images, video or audio"),
    "a lone surrogate in a question": (turns("\udfff", "Hello"), "invalid Unicode"),
    "a lone surrogate in a part": (
        turns("Hi", [{"type": "text", "text": "a\ud800"}]),
        "invalid Unicode",
    ),
    "a lone surrogate in a call": (
        turns("Hi", [{"type": "python", "text": "\ud800"}]),
        "invalid Unicode",
    ),
    "a question without end": (turns("word " * 1_000_000, "Hello"), "nothing left to train on"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_by_number_and_reason(case, tmp_path, make_stage, tokenizer):
    line, reason = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    good = [chat(0), chat(1)]
    path.write_bytes(b"\n".join([json.dumps(good[0]).encode(), line, json.dumps(good[1]).encode()]))
    stage = make_stage(str(path), name="mid", on_bad_rows="skip")
    train, _ = load_conversations(stage, tokenizer)
    assert [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()] == [
        {"source": str(path), "row": 1, "reason": reason}
    ]
    expected = [encode_conversation(row["messages"], tokenizer) for row in good]
    assert [(row["input_ids"], row["labels"]) for row in train] == expected


# rows of the other formats: a good one, a bad one, and why it is refused
ALPACA = {"instruction": "Hi", "output": "Hello"}
CHOICE = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
ARC = {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
PAIR = {"prompt": "Hi", "completion": "Hello"}
NOT_TEXT = "content that is not text"
NO_LIST = "choices that are not a list"
BAD_ROWS_OF_A_FORMAT = {
    "alpaca: a list": (ALPACA, {"instruction": ["Hi"]}, NOT_TEXT),
    "alpaca: a number beside": (ALPACA, {"input": 5}, NOT_TEXT),
    "alpaca: a mapping beside": (ALPACA, {"input": {"a": 1}}, NOT_TEXT),
    "alpaca: true": (ALPACA, {"output": True}, NOT_TEXT),
    "choice: nested": (CHOICE, {"choices": [["x"], "y"]}, NOT_TEXT),
    "choice: a mapping": (CHOICE, {"choices": [{"a": 1}, "y"]}, NOT_TEXT),
    "choice: true": (CHOICE, {"choices": [True, "y"]}, NOT_TEXT),
    "choice: null": (CHOICE, {"choices": [None, "y"]}, "empty content"),
    "choice: a list asks": (CHOICE, {"question": ["Which?"]}, NOT_TEXT),
    "choice: true answers": (CHOICE, {"answer": True}, NOT_TEXT),
    "choice: a list answers": (CHOICE, {"answer": ["B"]}, "the answer is not among the choices"),
    "choice: null answers": (CHOICE, {"answer": None}, "the answer is not among the choices"),
    "choice: none answers": (CHOICE, {"answer": 2}, "the answer is not among the choices"),
    "choice: one text": (CHOICE, {"choices": "xy"}, "choices that are not a list"),
    "arc: one text": (
        ARC,
        {"choices": {"text": "xy", "label": "AB"}},
        "choices that are not a list",
    ),
    "arc: a nested label": (ARC, {"choices": {"text": ["x"], "label": [["A"]]}}, NOT_TEXT),
    "arc: no label": (
        ARC,
        {"choices": {"text": ["x", "y"], "label": ["B"]}},
        "not a row of format multiple_choice",
    ),
    "pair: null prompt": (PAIR, {"prompt": None}, "empty content"),
    "pair: null completion": (PAIR, {"completion": None}, "empty content"),
    "pair: a number": (PAIR, {"completion": 4}, NOT_TEXT),
    "pair: to avoid": (PAIR, {"label": False}, "an undesirable answer (label: false)"),
    "pair: preferred": (
        PAIR,
        {"chosen": "Hello", "rejected": "Bye"},
        "a preference row (chosen and rejected)",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS_OF_A_FORMAT)
def test_a_bad_row_of_another_format_is_refused(case, tmp_path, make_stage, tokenizer):
    good, bad, reason = BAD_ROWS_OF_A_FORMAT[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | bad)}\n")
    stage = make_stage(str(path), name="mid", on_bad_rows="skip")
    train, _ = load_conversations(stage, tokenizer)
    assert len(train) == 1
    assert [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()] == [
        {"source": str(path), "row": 1, "reason": reason}
    ]


GOOD_ROWS = {
    "media columns that are empty": row([USER, ASSISTANT], images=[], image=None, audio=""),
    "an answer that is preferred": row([USER, ASSISTANT], chosen=[ASSISTANT], rejected=None),
    "a label of another kind": row([USER, ASSISTANT], label=False),
    "NaN beside": turns("Hi", "Hello")[:-1] + b', "score": NaN, "more": -Infinity}',
    "the last of two is taken": b'{"messages": null, ' + turns("Hi", "Hello")[1:],
    "odd columns beside": turns("Hi", "Hello")[:-1]
    + b', "": 1, "a.b": 2, "\\u0000": 3, "\xc3\xa9": 4}',
    "our own columns beside": turns("Hi", "Hello")[:-1] + b', "hfsft_row": "x", "input_ids": "y"}',
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_an_odd_row_that_says_what_it_means_is_trained_on(case, tmp_path, make_stage, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD_ROWS[case])
    train, _ = load_conversations(make_stage(str(path), name="mid"), tokenizer)
    expected = encode_conversation([USER, ASSISTANT], tokenizer)
    assert [(row["input_ids"], row["labels"]) for row in train] == [expected]


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_giant_rows_are_cut(policy, tmp_path, make_stage, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([turns("Hi", "a" * 5_000_000), turns(*["Hi", "Hello"] * 10_000)]))
    stage = make_stage(str(path), name="mid", on_too_long=policy)
    train, _ = load_conversations(stage, tokenizer)
    audit = json.loads((stage.folder / "data.json").read_text())["sources"][0]
    assert audit["read"] == 2 and not audit["refused"]
    assert max(train["length"]) <= 64
    if policy == "split":
        exchange = len(encode_conversation([USER, ASSISTANT], tokenizer)[0])
        per_row = (64 - 1) // (exchange - 1)  # behind one <|bos|>
        assert len(train) == 1 + -(-10_000 // per_row)
    else:
        assert len(train) == audit["truncated"] == 2


BAD_TEXTS = {
    "null": {"text": None},
    "a number": {"text": 5},
    "a list": {"text": ["Hello there."]},
    "a mapping": {"text": {"text": "Hello there."}},
    "spaces": {"text": " \n\t\u3000"},
    "a lone surrogate": {"text": "Hello \udc00 there."},
    "no column": {"Text": "Hello there."},
    "no mapping": "Hello there.",
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_text_is_refused_by_number_and_reason(case, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "One is kept."}, BAD_TEXTS[case], {"text": "Two\0too."}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    base = {"max_steps": 1, "max_length": 32, "held_out": 0, "tokens_per_step": None}
    base |= {"data": [str(path)], "on_bad_rows": "skip", "per_device_train_batch_size": 1}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path),
                "model": {"depth": 1, "vocab_size": 512},
                "tokenizer": {"train": True},
                "base": base,
            }
        )
    )
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), "--quiet")
    train, _ = load_text(recipe, tokenizer)
    assert [json.loads(line) for line in (recipe.base.folder / "rejected.jsonl").open()] == [
        {"source": str(path), "row": 1, "reason": "no text"}
    ]
    text = "".join(tokenizer.decode(ids) for ids in train["input_ids"])
    assert sorted(text.split("<|bos|>")) == ["", "One is kept.", "Two\0too."]


# --- files ---

LINES = b"".join(json.dumps(chat(number)).encode() + b"\n" for number in range(20))


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


PARQUET = parquet([chat(number) for number in range(20)])
# Arrow looks into no text before it is read
LATIN_1 = pa.StringArray.from_buffers(
    1, pa.py_buffer(np.array([0, 4], np.int32)), pa.py_buffer(b"caf\xe9")
)
PARQUET_IN_LATIN_1 = parquet_table(pa.table({"prompt": LATIN_1, "completion": ["Hello"]}))
PAIRS = b"prompt,completion\n" + b"Hi,Hello\n" * 20
# what lies in the folder, the source's path in it, and what is said behind that path: nothing in
# particular where several causes come to the same
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
        {"r.json": json.dumps([chat(0)]).encode("utf-16")},
        "r.json",
        "not UTF-8 text",
    ),
    "utf-16 csv": ({"r.csv": PAIRS.decode().encode("utf-16")}, "r.csv", "cannot be read:"),
    "latin-1 csv": ({"r.csv": PAIRS + b"caf\xe9,x\n"}, "r.csv", "cannot be read:"),
    "latin-1 text": ({"r.txt": b"caf\xe9"}, "r.txt", "cannot be read:"),
    "blank lines alone": ({"r.jsonl": b"\n \n\n"}, "r.jsonl", "has no rows"),
    "a mapping of rows": (
        {"r.json": json.dumps({"a": chat(0)}).encode()},
        "r.json",
        "is not a list of rows",
    ),
    "a list that ends early": (
        {"r.json": json.dumps([chat(0)]).encode()[:-4]},
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
        {"r.json.zst": zstandard.ZstdCompressor().compress(json.dumps([chat(0)]).encode())[:30]},
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
        {"r.parquet": parquet(datasets.Dataset.from_list([chat(0)]).select([]))},
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
        {"r.parquet": parquet([{"hfsft_json": json.dumps(chat(0)), "hfsft_row": 7}])},
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
    """Runs `hfsft data` on a source: its exit status and what it says."""

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
    files, name, says = BAD_FILES[case]
    folder = tmp_path / "data"
    folder.mkdir()
    for inside, content in files.items():
        (folder / inside).parent.mkdir(exist_ok=True)
        if callable(content):
            content(folder / inside)
        else:
            (folder / inside).write_bytes(content)
    status, said = hfsft_data(folder / name)
    assert status == 2, said
    assert said.startswith(f"hfsft: {folder / name}: {says}")
    assert len(said.splitlines()) <= 2 and len(said) < 700
    assert not caplog.records  # datasets logs what it raises, too


def test_a_file_may_bear_any_name(tmp_path, make_stage, tokenizer):
    for name in ("r[1] é\t.jsonl", "a\nb.jsonl", "*.jsonl", "~.jsonl", " .jsonl"):
        (tmp_path / name).write_bytes(LINES)
        train, _ = load_conversations(make_stage(str(tmp_path / name), name="mid"), tokenizer)
        assert len(train) == 20


def test_images_are_refused_and_not_decoded(tmp_path, make_stage, tokenizer):
    """That takes packages that need not be there."""
    features = datasets.Features(datasets.Dataset.from_list([chat(0)]).features)
    for name, feature, values in (
        ("image", datasets.Image(), [{"bytes": b"x", "path": None}, None]),
        ("images", datasets.List(datasets.Image()), [[{"bytes": b"x", "path": None}], []]),
        ("audio", datasets.Audio(), [{"bytes": b"x", "path": None}, None]),
    ):
        columns = {"messages": [chat(0)["messages"], chat(1)["messages"]], name: values}
        schema = datasets.Features(features | {name: feature}).arrow_schema
        (tmp_path / "r.parquet").write_bytes(parquet_table(pa.table(columns, schema=schema)))
        stage = make_stage(str(tmp_path / "r.parquet"), name="mid", on_bad_rows="skip")
        assert len(load_conversations(stage, tokenizer)[0]) == 1
        (refused,) = (json.loads(line) for line in (stage.folder / "rejected.jsonl").open())
        assert (refused["row"], refused["reason"]) == (0, "has images, video or audio")


def test_a_weight_that_leaves_nothing_is_an_error(tmp_path, make_stage, tokenizer):
    (tmp_path / "r.jsonl").write_text(json.dumps(chat(0)))
    stage = make_stage(Source(str(tmp_path / "r.jsonl"), weight=0.1), name="mid")
    with pytest.raises(DataError, match=r"^mid: no row is left to train on; `weight` is too small"):
        load_conversations(stage, tokenizer)


def test_a_csv_s_cells_are_the_text_they_are(tmp_path, make_stage, tokenizer):
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
    said = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in pairs
    ]
    assert train["input_ids"][:] == [encode_conversation(one, tokenizer)[0] for one in said]
    assert [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()] == [
        {"source": str(tmp_path / "r.csv"), "row": row, "reason": "empty content"} for row in (5, 6)
    ]


@pytest.mark.parametrize("first", [b"{}", b'{"id": 1}', b"[]", b'{"id": 1}\n{"id": 2}'])
def test_bad_first_rows_do_not_hide_the_format(first, tmp_path, make_stage, tokenizer):
    (tmp_path / "r.jsonl").write_bytes(first + b"\n" + LINES)
    stage = make_stage(str(tmp_path / "r.jsonl"), name="mid", on_bad_rows="skip")
    assert len(load_conversations(stage, tokenizer)[0]) == 20


def test_a_folder_s_json_is_read_split_by_split(tmp_path, make_stage, tokenizer):
    rows = [chat(number) for number in range(20)]
    mixed = [rows[0] | {"id": 1}, rows[1] | {"id": "x", "more": [2]}, *rows[2:]]
    (tmp_path / "README.md").write_text("A dataset.")
    (tmp_path / "train-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed[:9]))
    (tmp_path / "train-2.json").write_text(json.dumps(mixed[9:12]))
    (tmp_path / "train-3.json").write_text("".join(json.dumps(row) + "\n" for row in mixed[12:]))
    (tmp_path / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1] * 3)
    for split, count in (("train", 20), ("test", 3)):
        stage = make_stage(Source(str(tmp_path), split=split), name="mid", duplicates="keep")
        assert len(load_conversations(stage, tokenizer)[0]) == count


def test_a_file_that_links_lead_to_is_read_once(tmp_path, make_stage, tokenizer):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "r.jsonl").write_bytes(LINES)
    (tmp_path / "inside" / "up").symlink_to(tmp_path)
    stage = make_stage(str(tmp_path / "**" / "*.jsonl"), name="mid")
    assert len(load_conversations(stage, tokenizer)[0]) == 20


def test_columns_that_bear_our_names_are_left_out(tmp_path, make_stage, tokenizer):
    rows = [chat(number) | {"hfsft_json": "[]", "hfsft_row": 7} for number in range(20)]
    (tmp_path / "r.parquet").write_bytes(parquet([*rows, {"messages": []}]))
    stage = make_stage(str(tmp_path / "r.parquet"), name="mid", on_bad_rows="skip")
    assert len(load_conversations(stage, tokenizer)[0]) == 20
    (refused,) = (json.loads(line) for line in (stage.folder / "rejected.jsonl").open())
    assert refused["row"] == 20


def test_where_nothing_is_left_the_reasons_are_written(tmp_path, make_stage, tokenizer):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"{\n" + row([USER]) + b"\n")
    stage = make_stage(str(path), name="mid")
    with pytest.raises(DataError) as error:
        load_conversations(stage, tokenizer)
    assert str(error.value) == (
        "mid: no row is left to train on; all were refused, the first is row 0 of "
        f"{path} (not JSON)"
    )
    rejected = [json.loads(line) for line in (stage.folder / "rejected.jsonl").open()]
    assert [entry["reason"] for entry in rejected] == ["not JSON", "no assistant turn"]


def test_bad_rows_stop_a_run_before_anything_is_encoded(
    tmp_path, make_stage, tokenizer, monkeypatch
):
    calls = []
    fit = encoded.fit_conversations
    monkeypatch.setattr(encoded, "fit_conversations", lambda *a: calls.append(1) or fit(*a))
    path = tmp_path / "r.jsonl"
    path.write_bytes(LINES + b"{\n")
    with pytest.raises(DataError, match=r"1 of 21 rows are bad, the first is row 20 \(not JSON\)"):
        load_conversations(make_stage(str(path), name="mid"), tokenizer)
    assert calls == []
    stage = make_stage(str(path), name="mid", on_bad_rows="skip")
    assert len(load_conversations(stage, tokenizer)[0]) == 20 and calls
