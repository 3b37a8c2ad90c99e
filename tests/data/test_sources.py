"""Sources of every kind: files, folders, globs, the Hub, generated rows, and broken ones."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from chat_rows import (
    CONVERSATIONS,
    all_rendered,
    as_csv,
    as_parquet,
    conversation,
    rendered,
    texts_of,
    write_jsonl,
)
from hub_server import HubServer

from hfsft.data.mixture import load_conversations
from hfsft.data.sources import JSON_COLUMN, ROW_COLUMN, load_rows
from hfsft.data.tasks import facts, task_rows
from hfsft.errors import DataError
from hfsft.recipe.schema import Replay, Source

FILES = {
    "jsonl": lambda rows: "\n\n".join(map(json.dumps, rows)).encode(),
    "jsonl with a byte order mark": lambda rows: b"\xef\xbb\xbf" + FILES["jsonl"](rows),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.mark.parametrize(
    ("kind", "zipped"),
    [*((kind, False) for kind in FILES), ("jsonl", True), ("json", True), ("csv", True)],
)
def test_files_of_every_kind_give_the_same(kind, zipped, tmp_path, make_stage, tokenizer):
    data = FILES[kind](CONVERSATIONS)
    name = f"rows.{kind.split()[0]}" + (".gz" if zipped else "")
    (tmp_path / name).write_bytes(gzip.compress(data) if zipped else data)
    stage = make_stage(str(tmp_path / name))
    train, held_out = load_conversations(stage, tokenizer)
    assert held_out is None
    assert sorted(texts_of(train, tokenizer)) == all_rendered(tokenizer)
    assert all(list(row) == ["input_ids", "labels"] for row in train)


def test_folders_and_globs(tmp_path, make_stage, tokenizer, monkeypatch):
    expected = [rendered(row, tokenizer) for row in CONVERSATIONS]
    rows = datasets.Dataset.from_list(CONVERSATIONS)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, few=rows.select([3, 5])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.parquet").write_bytes(as_parquet(CONVERSATIONS))
    write_jsonl(tmp_path / "part-b.jsonl", CONVERSATIONS[7:])
    write_jsonl(tmp_path / "part-a.jsonl", CONVERSATIONS[:7])
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (
        tmp_path / "saved",
        tmp_path / "splits",
        tmp_path / "files",
        tmp_path / "part-*.jsonl",
        "~/saved",
        "~/part-*.jsonl",
    ):
        train, _ = load_conversations(make_stage(str(path)), tokenizer)
        assert sorted(texts_of(train, tokenizer)) == sorted(expected)
    few, _ = load_conversations(
        make_stage(Source(str(tmp_path / "splits"), split="few")), tokenizer
    )
    assert sorted(texts_of(few, tokenizer)) == sorted([expected[3], expected[5]])


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    rows = load_rows(Source(str(tmp_path / "*.txt")), 0)
    assert rows["text"][:] == ["one\n\ntwo\n", "three"]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four"))
    assert load_rows(Source(str(tmp_path / "c.txt.gz")), 0)["text"][:] == ["four"]


def test_built_in_sources():
    rows = load_rows(Source("identity", rows=5, split="test"), 3)
    assert [json.loads(row) for row in rows[JSON_COLUMN]] == task_rows("identity", 5, "test", 3)
    assert load_rows(Source("facts"), 0)["text"][:] == facts()


def test_rows_are_a_seeded_sample_and_first_are_the_first(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", CONVERSATIONS)
    sample = load_rows(Source(path, rows=5), 42)[ROW_COLUMN][:]
    assert sample == load_rows(Source(path, rows=5), 42)[ROW_COLUMN][:]
    assert len(set(sample)) == 5
    assert sorted(sample) != list(range(5))
    assert sample != load_rows(Source(path, rows=5), 43)[ROW_COLUMN][:]
    assert load_rows(Source(path, rows=5, first=True), 42)[ROW_COLUMN][:] == [0, 1, 2, 3, 4]
    assert load_rows(Source(path, rows=99), 42)[ROW_COLUMN][:] == list(range(20))


def broken(path: Path) -> str:
    """Write the content that the file's name describes, and return its path."""
    name = path.name
    lines = "".join(json.dumps(row) + "\n" for row in CONVERSATIONS).encode()
    path.write_bytes(
        {
            "half.parquet": as_parquet(CONVERSATIONS)[:700],
            "half.jsonl.gz": gzip.compress(lines)[:-20],
            "not.jsonl.gz": b"hello",
            "half.csv.gz": gzip.compress(as_csv(CONVERSATIONS))[:-20],
            "rows.parquet.gz": gzip.compress(as_parquet(CONVERSATIONS)),
            "object.json": b'{"data": []}',
            "lines.json": lines,
            "latin.jsonl": '{"text": "é"}'.encode("latin-1"),
            "ragged.csv": b"prompt,completion\na,b,c\n",
            "header.csv": b"prompt,completion\n",
            "list.json": b"[]",
            "number.jsonl": b"5\n[]\n{\n",
        }.get(name, b"")
    )
    return str(path)


BROKEN = {
    "half.parquet": "cannot be read: Parquet magic bytes not found in footer",
    "half.jsonl.gz": "cannot be read: Compressed file ended before the end-of-stream marker",
    "not.jsonl.gz": "cannot be read: Not a gzipped file",
    "half.csv.gz": "cannot be read: Compressed file ended before the end-of-stream marker",
    "rows.parquet.gz": "unknown kind of file '.gz'",
    "rows.xml": "unknown kind of file '.xml'; known are .jsonl, .json, .csv and .txt, each also "
    ".gz or .zst, and .parquet",
    "object.json": "is not a list of rows",
    "lines.json": "not a JSON list of rows: Extra data: line 2 column 1",
    "latin.jsonl": "not UTF-8 text (line 1)",
    "ragged.csv": "cannot be read: a row has more fields than the header",
    "header.csv": "has no rows",
    "list.json": "has no rows",
    "empty.jsonl": "has no rows",
    "empty.json": "not a JSON list of rows: Expecting value",
    "empty.csv": "cannot be read: No columns to parse from file",
    "empty.parquet": "cannot be read: Parquet file size is 0 bytes",
    "number.jsonl": "no row is a JSON object",
    "folder": "cannot be read: The directory at",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_that_names_it(name, tmp_path, make_stage, tokenizer):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        broken(path)
    with pytest.raises(DataError) as error:
        load_conversations(make_stage(str(path)), tokenizer)
    assert str(error.value).startswith(f"{path}: {BROKEN[name]}")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) - len(str(path)) < 150


def test_a_broken_file_of_several_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", CONVERSATIONS)
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError) as error:
        load_rows(Source(f"{tmp_path}/*.jsonl"), 0)
    assert str(error.value) == f"{tmp_path}/*.jsonl: b.jsonl: not UTF-8 text (line 1)"
    (tmp_path / "c.parquet").write_bytes(as_parquet([{"a": "x"}]))
    (tmp_path / "d.parquet").write_bytes(as_parquet([{"b": "x"}]))
    with pytest.raises(DataError) as error:
        load_rows(Source(f"{tmp_path}/*.parquet"), 0)
    assert str(error.value) == f"{tmp_path}/*.parquet: its files differ in their columns"


def test_a_source_that_is_not_there_is_an_error(tmp_path):
    rows = datasets.Dataset.from_list(CONVERSATIONS)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, few=rows).save_to_disk(tmp_path / "splits")
    write_jsonl(tmp_path / "a.jsonl", CONVERSATIONS)
    (tmp_path / "b.csv").write_bytes(as_csv(CONVERSATIONS))
    for path, split, message in (
        ("none.jsonl", "train", "no such file"),
        ("none", "train", "no such file"),
        ("*.none", "train", "no file matches"),
        ("[ab].*", "train", "matches files of several kinds: .csv, .jsonl"),
        ("a.jsonl", "test", "split: test: a file has no splits"),
        ("saved", "test", "split: test: a file has no splits"),
        ("splits", "test", "has no split test, only train, few"),
    ):
        with pytest.raises(DataError) as error:
            load_rows(Source(f"{tmp_path}/{path}", split=split), 0)
        named = f"{path}[test]" if split == "test" else path
        assert str(error.value) == f"{tmp_path}/{named}: {message}"
    for path in ("rows.jsonl", "rows.csv.gz"):  # not a valid name on the Hub
        with pytest.raises(DataError, match=rf"^{path}: no such file$"):
            load_rows(Source(path), 0)
    with pytest.raises(
        DataError, match=r"^identity\[dev\]: unknown split 'dev'; there are train, test$"
    ):
        load_rows(Source("identity", split="dev"), 0)


def test_two_splits_of_a_dataset_are_told_apart(make_stage, tokenizer):
    stage = make_stage(Source("identity", rows=5), Source("identity", rows=5, split="test"))
    load_conversations(stage, tokenizer)
    audit = json.loads((stage.folder / "data.json").read_text())
    assert [source["source"] for source in audit["sources"]] == ["identity", "identity[test]"]
    # a sample of rows is the same as before the split was in the name
    assert Source("a/b", name="c", split="test").seed_name == "a/b:c"
    assert Replay("a/b", split="test").seed_name == "a/b (replay)"


def test_columns_are_renamed(tmp_path, make_stage, tokenizer):
    rows = [{"chat": row["messages"], "messages": "other", "id": 1} for row in CONVERSATIONS]
    (tmp_path / "c.parquet").write_bytes(as_parquet(rows))
    for path in (write_jsonl(tmp_path / "c.jsonl", rows), str(tmp_path / "c.parquet")):
        stage = make_stage(Source(path, columns={"messages": "chat"}))
        train, _ = load_conversations(stage, tokenizer)
        assert sorted(texts_of(train, tokenizer)) == all_rendered(tokenizer)
    rows = [{"q": "Hi", "a": "Hello"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    stage = make_stage(Source(path, columns={"prompt": "q", "completion": "a"}))
    train, _ = load_conversations(stage, tokenizer)
    assert texts_of(train, tokenizer) == [rendered(conversation("Hi", "Hello"), tokenizer)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_wrong_columns_are_an_error_that_lists_them(kind, tmp_path, make_stage, tokenizer):
    path = tmp_path / f"r.{kind}"
    path.write_bytes(FILES[kind]([{"chat": "Hi", "id": 1}]))
    with pytest.raises(DataError) as error:
        load_conversations(make_stage(str(path)), tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: cannot tell the format from its columns chat, id"
    assert len(lines) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_renamed_column_that_is_missing_is_an_error(kind, tmp_path, make_stage, tokenizer):
    path = tmp_path / f"r.{kind}"
    path.write_bytes(FILES[kind]([row | {"id": 1} for row in CONVERSATIONS]))
    with pytest.raises(DataError) as error:  # and no other column is read instead
        load_conversations(make_stage(Source(str(path), columns={"messages": "talk"})), tokenizer)
    assert str(error.value) == f"{path}: columns: has no column 'talk', only messages, id"


def test_other_columns_may_have_any_name(tmp_path, make_stage, tokenizer):
    rows = [row | {"row_number": "x", "length": "long"} for row in CONVERSATIONS]
    (tmp_path / "r.parquet").write_bytes(as_parquet(rows))
    train, _ = load_conversations(make_stage(str(tmp_path / "r.parquet")), tokenizer)
    assert len(train) == 20


def test_zstandard_files(tmp_path, make_stage, tokenizer):
    import zstandard

    path = tmp_path / "rows.jsonl.zst"
    plain = "".join(json.dumps(row) + "\n" for row in CONVERSATIONS).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(plain))
    train, _ = load_conversations(make_stage(str(path)), tokenizer)
    assert sorted(texts_of(train, tokenizer)) == all_rendered(tokenizer)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst"):
        load_conversations(make_stage(str(path)), tokenizer)


def test_an_edited_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", CONVERSATIONS[:3])
    assert len(load_rows(Source(path), 0)) == 3
    write_jsonl(tmp_path / "r.jsonl", CONVERSATIONS[:4])
    assert len(load_rows(Source(path), 0)) == 4


def test_reasoning_gym(make_stage, tokenizer):
    pytest.importorskip("reasoning_gym", reason="the extra hfsft[tasks] is not installed")
    stage = make_stage(Source("reasoning_gym", name="chain_sum", rows=20, seed=1), max_length=200)
    train, _ = load_conversations(stage, tokenizer)
    assert len(train) == 20
    assert "4 - 1 - 7 =" in texts_of(train, tokenizer)[0]
    assert texts_of(train, tokenizer)[0].endswith("<|assistant_start|>-4<|assistant_end|>")
    with pytest.raises(DataError, match="none of its 106 generators; did you mean 'chain_sum'"):
        load_conversations(make_stage(Source("reasoning_gym", name="chain_sun")), tokenizer)


def test_a_dataset_on_the_hub(tmp_path):
    """Sources read through the real clients, from a Hub on loopback."""
    code = (
        "import json, sys\n"
        "from hfsft.recipe.schema import Source\n"
        "from hfsft.data.sources import load_rows\n"
        "from hfsft.errors import DataError\n"
        "for source in (Source('me/chats'), Source('me/chats', rows=3), Source('me/chats',"
        " split='nothing'), Source('me/none'), Source('me/secret')):\n"
        "    try: print(len(load_rows(source, 0)))\n"
        "    except DataError as error: print(str(error).splitlines()[0])\n"
    )
    rows = "".join(json.dumps(row) + "\n" for row in CONVERSATIONS).encode()
    with HubServer() as hub:
        hub.add_repo("me/chats", "dataset", {"train.jsonl": rows})
        hub.add_repo("me/secret", "dataset", {"train.jsonl": rows}, private=True)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.env(tmp_path, "hf_other"),
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["20", "3"]
    assert lines[2].startswith("me/chats[nothing]: cannot be loaded: Unknown split")
    for line, name in zip(lines[3:], ("none", "secret"), strict=True):
        assert line == (
            f"no dataset me/{name} here or on the Hub (a private one needs `hf auth login`)"
        )
