"""Sources of every kind, and the fate of each row: kept, cut, refused, repeated or held out."""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hub_server import HubServer

from hfsft.data.mixture import load_conversations, load_packed_conversations
from hfsft.data.sources import JSON_COLUMN, ROW_COLUMN, load_rows
from hfsft.data.tasks import facts, task_rows
from hfsft.errors import DataError
from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import IGNORED, encode_conversation


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def make_stage(make_stage):
    """Makes a stage of one epoch, one conversation a step: each is an example once."""

    def make(*data, eval_strategy: str = "steps", **settings):
        trainer = {"num_train_epochs": 1, "eval_strategy": eval_strategy}
        return make_stage(*data, **{"examples_per_step": 1, "trainer": trainer} | settings)

    return make


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


# --- rows of one source ---


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
    """The path, with what its name says written into it."""
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
    for path, split, says in (
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
        assert str(error.value) == f"{tmp_path}/{path}: {says}"
    for path in ("rows.jsonl", "rows.csv.gz"):  # no name on the Hub
        with pytest.raises(DataError, match=rf"^{path}: no such file$"):
            load_rows(Source(path), 0)
    with pytest.raises(DataError, match=r"^identity: unknown split 'dev'; there are train, test$"):
        load_rows(Source("identity", split="dev"), 0)


# --- conversations ---


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
    for columns in ({}, {"messages": "talk"}):
        with pytest.raises(DataError) as error:
            load_conversations(make_stage(Source(str(path), columns=columns)), tokenizer)
        lines = str(error.value).splitlines()
        assert lines[0] == f"{path}: cannot tell the format from its columns chat, id"
        assert len(lines) == 2


def test_a_column_that_bears_our_name_is_no_trouble(tmp_path, make_stage, tokenizer):
    rows = [row | {"row_number": "x", "length": "long"} for row in CONVERSATIONS]
    (tmp_path / "r.parquet").write_bytes(as_parquet(rows))
    train, _ = load_conversations(make_stage(str(tmp_path / "r.parquet")), tokenizer)
    assert len(train) == 20


def test_refused_rows_are_listed_and_data_json_counts(tmp_path, make_stage, tokenizer):
    long = conversation("Long?", "word " * 200)
    too_long = conversation("word " * 200, "No.")
    path = tmp_path / "r.jsonl"
    lines = [
        json.dumps(CONVERSATIONS[0]),
        '{"messages": [',
        json.dumps(long),
        json.dumps({"messages": []}),
        json.dumps(too_long),
        json.dumps({"other": 1}),
        "[1]",
        json.dumps(CONVERSATIONS[1]),
        json.dumps(conversation("Hi", "")),
        json.dumps({"messages": []}),
    ]
    path.write_text("\n".join(lines))
    other = write_jsonl(tmp_path / "other.jsonl", CONVERSATIONS[2:12])
    sources = (str(path), Source(other, rows=5, repeat=3))
    with pytest.raises(DataError) as error:
        load_conversations(make_stage(*sources, max_length=48), tokenizer)
    folder = make_stage(*sources).folder
    assert str(error.value) == (
        f"{path}: 6 of 10 rows are bad, the first is row 1 (not JSON)\n  All are listed in "
        f"{folder / 'rejected.jsonl'}; to train on the rest: --on_bad_rows skip"
    )
    stage = make_stage(*sources, max_length=48, on_bad_rows="skip")
    train, _ = load_conversations(stage, tokenizer)

    source = str(path)
    assert read_jsonl(stage.folder / "rejected.jsonl") == [
        {"source": source, "row": 1, "reason": "not JSON"},
        {"source": source, "row": 3, "reason": "no messages"},
        {"source": source, "row": 4, "reason": "nothing left to train on"},
        {"source": source, "row": 5, "reason": "not a row of format messages"},
        {"source": source, "row": 6, "reason": "not a JSON object"},
        {"source": source, "row": 8, "reason": "empty content"},
        {"source": source, "row": 9, "reason": "no messages"},
    ]
    kept = [encode_conversation(r["messages"], tokenizer) for r in (CONVERSATIONS[0], long)]
    kept = [(ids[:48], labels[:48]) for ids, labels in kept]
    kept.append(encode_conversation(CONVERSATIONS[1]["messages"], tokenizer))
    audit = json.loads((stage.folder / "data.json").read_text())
    first, second = audit.pop("sources")
    assert audit == {
        "train": 18,
        "held_out": 0,
        "used": 18,
        "different": 8,
        "examples_per_step": 1,
    }
    lengths = sorted(len(ids) for ids, _ in kept)
    assert first == {
        "source": source,
        "read": 10,
        "kept": 4,
        "excluded": {"nothing left to train on": 1},
        "prepared": 3,
        "train": 3,
        "used": 3,
        "held_out": 0,
        "copies_of_held_out": 0,
        "copies": 1.0,
        "split": 0,
        "duplicates": 0,
        "refused": {
            "not JSON": 1,
            "no messages": 2,
            "not a row of format messages": 1,
            "not a JSON object": 1,
            "empty content": 1,
        },
        "truncated": 1,
        "tokens": sum(lengths),
        "trained_tokens": sum(label != IGNORED for _, labels in kept for label in labels),
        "length_percentiles": {"5": lengths[0], "50": lengths[1], "95": 48, "100": 48},
    }
    rows = [(row["input_ids"], row["labels"]) for row in train]
    assert all(rows.count(pair) == 1 for pair in kept)
    assert train.lengths == [len(ids) for ids, _ in rows]
    assert (second["read"], second["kept"], second["train"], second["refused"]) == (5, 5, 15, {})
    assert len(train) == 3 + 5 * 3
    others = {tuple(ids) for ids, _ in rows} - {tuple(ids) for ids, _ in kept}
    assert second["tokens"] == sum(map(len, others))


def test_a_cut_conversation_keeps_a_trained_token_or_is_refused(make_stage, tokenizer, tmp_path):
    row = conversation("Hello there?", "Yes indeed.")
    ids, labels = encode_conversation(row["messages"], tokenizer)
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    path = write_jsonl(tmp_path / "r.jsonl", [row])
    for length in range(2, len(ids) + 2):
        stage = make_stage(path, max_length=length)
        if length <= first:
            with pytest.raises(DataError) as error:
                load_conversations(stage, tokenizer)
            assert str(error.value) == (
                "sft: no row is left to train on; all were refused, the first is row 0 of "
                f"{path} (nothing left to train on)"
            )
            assert read_jsonl(stage.folder / "rejected.jsonl") == [
                {"source": path, "row": 0, "reason": "nothing left to train on"}
            ]
        else:
            train, _ = load_conversations(stage, tokenizer)
            assert train[0]["input_ids"] == ids[:length]
            assert train[0]["labels"] == labels[:length]
            assert train[0]["labels"][first] != IGNORED


def used_rows(train, tokenizer) -> list[str]:
    """The question of every example of a run, in order."""
    return [
        text.split("<|user_start|>")[1].split("<|user_end|>")[0]
        for text in texts_of(train, tokenizer)
    ]


def test_a_run_s_order_is_its_permutations_whatever_its_length(make_stage, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", CONVERSATIONS)
    expected = []
    for epoch in range(4):
        order = list(range(20))
        random.Random(f"42:epoch:{epoch}").shuffle(order)
        expected += [f"Question {number}?" for number in order]
    for steps, examples in ((1, 4), (3, 4), (3, 7), (9, 8)):
        stage = make_stage(path, max_steps=steps, examples_per_step=examples)
        train, _ = load_conversations(stage, tokenizer)
        assert len(train) == len(train.lengths) == steps * examples
        assert used_rows(train, tokenizer) == expected[: steps * examples]
        assert train.lengths == [len(row["input_ids"]) for row in train]
    # epochs: as many steps as hold them
    for epochs, examples, count in ((1, 8, 24), (2.5, 10, 50), (0.01, 6, 6)):
        trainer = {"num_train_epochs": epochs}
        stage = make_stage(path, examples_per_step=examples, trainer=trainer)
        train, _ = load_conversations(stage, tokenizer)
        assert used_rows(train, tokenizer) == expected[:count]


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


def test_only_what_a_run_uses_is_prepared(make_stage, tokenizer, tmp_path):
    sources = mixed(tmp_path)
    longest = []
    for steps in (4, 10, 25):
        stage = make_stage(*sources, max_steps=steps, **MIXED)
        train, held_out = load_conversations(stage, tokenizer)
        audit = json.loads((stage.folder / "data.json").read_text())
        used = len(set(train.indices)) + len(held_out)
        prepared = sum(source["prepared"] for source in audit["sources"])
        assert prepared == used == len(train.conversations)
        # and no more is tried than what takes the place of those that are too long
        excluded = sum(sum(source["excluded"].values()) for source in audit["sources"])
        assert 0 < excluded < 0.25 * used
        rejected = read_jsonl(stage.folder / "rejected.jsonl")
        assert sum(entry["reason"] == "longer than max_length" for entry in rejected) == excluded
        # a longer run begins with the same examples
        questions = used_rows(train, tokenizer)
        assert questions[: len(longest)] == longest
        longest = questions
    stage = make_stage(*sources, trainer={"num_train_epochs": 1, "eval_strategy": "steps"}, **MIXED)
    assert used_rows(load_conversations(stage, tokenizer)[0], tokenizer)[: len(longest)] == longest


def test_a_second_start_encodes_nothing(make_stage, tokenizer, tmp_path):
    cache = Path(datasets.config.HF_DATASETS_CACHE)

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}

    sources = [*mixed(tmp_path), Source("small_talk", rows=40)]
    stage = make_stage(*sources, max_steps=6, **MIXED)
    before = files()
    first, held_out = load_conversations(stage, tokenizer)
    made = files()
    assert len(made) > len(before)
    again, held_again = load_conversations(stage, tokenizer)
    assert files() == made
    assert [*again] == [*first] and [*held_again] == [*held_out]
    load_conversations(make_stage(*sources, max_steps=6, **MIXED | {"max_length": 60}), tokenizer)
    assert len(files()) > len(made)


def test_counts_can_be_recounted_by_hand(make_stage, tokenizer, tmp_path, capsys):
    sources = mixed(tmp_path)
    stage = make_stage(*sources, max_steps=25, quiet=False, **MIXED)
    train, held_out = load_conversations(stage, tokenizer)
    shown = capsys.readouterr().out.splitlines()
    audit = json.loads((stage.folder / "data.json").read_text())
    rejected = read_jsonl(stage.folder / "rejected.jsonl")
    rows = [read_jsonl(Path(source.path)) for source in sources]
    names = [[r["messages"][0]["content"] for r in part if r["messages"]] for part in rows]
    held = {text.split("|>")[2].split("<|")[0] for text in texts_of(held_out, tokenizer)}
    places = used_rows(train, tokenizer)
    assert len(held) == audit["held_out"] == 30
    assert not held & set(places)

    # the run's order over the rows of the three files, written down a second time
    epoch = [
        (index, row)
        for index, (source, own) in enumerate(zip(sources, names, strict=True))
        for row in [row for row, name in enumerate(own) if name not in held] * source.repeat
    ]
    too_long = {f"Question {number}?" for number in range(0, 400, 9)}
    by_hand = []
    for number in range(3):
        order = list(range(len(epoch)))
        random.Random(f"42:epoch:{number}").shuffle(order)
        rows_in_order = [epoch[i] for i in order]
        by_hand += [(i, row) for i, row in rows_in_order if names[i][row] not in too_long]
    by_hand = by_hand[: 25 * 8]
    assert places == [names[index][row] for index, row in by_hand]

    for index, (counted, own) in enumerate(zip(audit["sources"], names, strict=True)):
        path = sources[index].path
        refused = [entry["reason"] for entry in rejected if entry["source"] == path]
        assert counted["read"] == len(rows[index]) == counted["kept"] + refused.count("no messages")
        assert counted["kept"] == len(own)
        trainable = sum(name not in held for name in own)
        assert counted["copies_of_held_out"] == len(own) - trainable - counted["held_out"]
        assert counted["train"] == trainable * sources[index].repeat
        mine = [row for source, row in by_hand if source == index]
        assert counted["used"] == len(mine)
        assert counted["prepared"] == len(set(mine)) + counted["held_out"]
        assert counted["excluded"] == {
            "longer than max_length": refused.count("longer than max_length")
        }
        numbers = [
            counted[key] for key in ("read", "kept", "held_out", "train", "used", "prepared")
        ]
        assert any(" ".join(map(str, numbers)) in " ".join(line.split()) for line in shown)
    assert sum(counted["used"] for counted in audit["sources"]) == audit["used"] == len(places)
    assert sum(counted["held_out"] for counted in audit["sources"]) == 30
    assert audit["train"] == sum(counted["train"] for counted in audit["sources"])
    seen = [*(train.conversations[place] for place in sorted(set(train.indices))), *held_out]
    assert sum(counted["tokens"] for counted in audit["sources"]) == sum(
        len(row["input_ids"]) for row in seen
    )
    assert sum(counted["trained_tokens"] for counted in audit["sources"]) == sum(
        label != IGNORED for row in seen for label in row["labels"]
    )
    assert shown[-1] == (
        f"{audit['train']} conversations to train on, 30 held out; "
        f"this run's 25 steps of 8 use {len(set(train.indices))}, 200 times in total"
    )
    assert max(map(len, shown)) > 80 and shown[0].endswith("trained median max long")


PLACES = """
import json, sys
from pathlib import Path
import datasets
from accelerate import PartialState
from hfsft.data.mixture import load_conversations
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.tokenizer import load_tokenizer
datasets.disable_progress_bars()
given = json.loads(sys.argv[1])
data, folder = [Source(**one) for one in given.pop("data")], Path(given.pop("folder"))
state = PartialState(cpu=True)
stage = Stage(data=data, folder=folder, **given)
train, held_out = load_conversations(stage, load_tokenizer(sys.argv[2]))
found = [state.num_processes, [list(row["input_ids"]) for row in train], held_out["input_ids"][:]]
Path(sys.argv[3], f"{state.process_index}.json").write_text(json.dumps(found))
"""


def test_the_order_is_the_same_on_every_process(make_stage, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sources = mixed(tmp_path)
    stage = make_stage(*sources, max_steps=10, **MIXED)
    train, held_out = load_conversations(stage, tokenizer)
    settings = {
        **{"name": "sft", "folder": str(tmp_path / "two"), "seed": 42, "max_steps": 10},
        **MIXED,
        "data": [{"path": source.path, "repeat": source.repeat} for source in sources],
        "assistant_only_loss": True,
        "trainer": {"eval_strategy": "steps"},
        "quiet": True,
    }
    (tmp_path / "places.py").write_text(PLACES)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", str(tmp_path / "places.py"), json.dumps(settings)),
            *(str(tmp_path / "tokenizer"), str(tmp_path)),
        ],
        # a cache of their own, so that one process makes it while the other waits
        env=os.environ
        | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    alone = [2, [row["input_ids"] for row in train], held_out["input_ids"][:]]
    for process in range(2):
        assert json.loads((tmp_path / f"{process}.json").read_text()) == alone


def test_processes_that_encode_change_nothing(make_stage, tokenizer, tmp_path):
    rows = [conversation(f"Number {number}?") for number in range(1100)]
    path = write_jsonl(tmp_path / "many.jsonl", rows)
    alone, _ = load_conversations(make_stage(path), tokenizer)
    path = write_jsonl(tmp_path / "copy.jsonl", [*rows, rows[0]])  # nothing of it is cached
    several, _ = load_conversations(
        make_stage(path, dataset_num_proc=2, duplicates="drop"), tokenizer
    )
    assert [*several] == [*alone]


def test_what_is_cut_to_a_held_out_conversation_s_tokens_is_not_trained_on(
    make_stage, tokenizer, tmp_path
):
    rows = [
        conversation(f"Question {n // 2}?", "word " * 40 + "ab"[n % 2]) for n in range(20)
    ]  # two by two the same in their first 48 tokens
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    for settings in ({"max_steps": 4, "examples_per_step": 4}, {}):
        stage = make_stage(path, held_out=3, max_length=48, **settings)
        train, held_out = load_conversations(stage, tokenizer)
        held = texts_of(held_out, tokenizer)
        assert len(held) == 3 and not set(held) & set(texts_of(train, tokenizer))
        reasons = {entry["reason"] for entry in read_jsonl(stage.folder / "rejected.jsonl")}
        assert reasons == {"the same tokens as a held-out conversation"}


def test_held_out_rows_that_are_split_are_held_out_whole(make_stage, tokenizer, tmp_path):
    long = [
        {"messages": [m for c in CONVERSATIONS[n : n + 4] for m in c["messages"]]}
        for n in range(0, 20, 4)
    ]
    path = write_jsonl(tmp_path / "long.jsonl", long)
    limit = 2 * len(encode_conversation(CONVERSATIONS[0]["messages"], tokenizer)[0])
    stage = make_stage(path, max_length=limit, on_too_long="split", held_out=2)
    train, held_out = load_conversations(stage, tokenizer)
    audit = json.loads((stage.folder / "data.json").read_text())
    assert (audit["sources"][0]["kept"], audit["sources"][0]["split"]) == (5, 5)
    assert len(held_out) == audit["held_out"] and len(train) == audit["train"]
    assert len(held_out) >= 4 and len(train) >= 6
    numbers = [
        {
            n
            for n in range(20)
            if any(f"Question {n}?" in text for text in texts_of(rows, tokenizer))
        }
        for rows in (train, held_out)
    ]
    assert [len(found) for found in numbers] == [12, 8]
    assert {n // 4 for n in numbers[0]}.isdisjoint(n // 4 for n in numbers[1])


def test_tool_calls_of_every_form_train(make_stage, tokenizer, tmp_path):
    arguments = {"a": 1}
    function = {"name": "f", "arguments": json.dumps(arguments)}
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "5"},
        {"role": "assistant", "content": "Five", "tool_calls": None},
    ]
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": arguments})},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "Five"},
    ]
    paths = [
        write_jsonl(tmp_path / "m.jsonl", [{"messages": messages, "tools": []}]),
        write_jsonl(tmp_path / "s.jsonl", [{"conversations": turns, "tools": ""}]),
        str(tmp_path / "m.parquet"),
    ]
    Path(paths[2]).write_bytes(as_parquet([{"messages": messages}]))
    train, _ = load_conversations(make_stage(*paths), tokenizer)
    assert (
        texts_of(train, tokenizer)
        == [
            "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|><|python_start|>"
            '{"name": "f", "arguments": {"a": 1}}<|python_end|><|output_start|>5<|output_end|>'
            "Five<|assistant_end|>"
        ]
        * 3
    )


def test_all_tokens_train_without_assistant_only(make_stage, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", CONVERSATIONS)
    train, _ = load_conversations(make_stage(path, assistant_only_loss=False), tokenizer)
    assert all(row["labels"] == row["input_ids"] for row in train)


def test_held_out_conversations_are_in_no_training_row(make_stage, tokenizer, tmp_path):
    # 20 different ones; b has 10 of them again, and c one of those five times
    a = write_jsonl(tmp_path / "a.jsonl", CONVERSATIONS)
    b = write_jsonl(tmp_path / "b.jsonl", CONVERSATIONS[:10])
    c = write_jsonl(tmp_path / "c.jsonl", [CONVERSATIONS[3]] * 5)
    stage = make_stage(a, Source(b, repeat=2), c, held_out=6)
    train, held_out = load_conversations(stage, tokenizer)
    held = texts_of(held_out, tokenizer)
    assert len(held) == len(set(held)) == 6
    names = [rendered(row, tokenizer) for row in CONVERSATIONS]
    assert set(held) <= set(names)
    weight = dict.fromkeys(names, 1)
    for name in names[:10]:
        weight[name] += 2
    weight[names[3]] += 5
    trained = texts_of(train, tokenizer)
    assert sorted(trained) == sorted(
        name for name in names if name not in held for _ in range(weight[name])
    )
    # the same conversations whatever the order of the sources, others with another seed
    again = load_conversations(make_stage(c, b, a, held_out=6), tokenizer)[1]
    assert sorted(texts_of(again, tokenizer)) == sorted(held)
    other = load_conversations(make_stage(a, b, c, held_out=6, seed=1), tokenizer)[1]
    assert sorted(texts_of(other, tokenizer)) != sorted(held)


def test_held_out_may_be_a_share_or_none(make_stage, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", CONVERSATIONS * 2)
    for held_out, count in ((0.25, 5), (0.01, 1), (3, 3)):
        train, held = load_conversations(make_stage(path, held_out=held_out), tokenizer)
        assert (len(train), len(held)) == (40 - 2 * count, count)
    for stage in (
        make_stage(path, held_out=0),
        make_stage(path, held_out=5, eval_strategy="no"),
    ):
        train, held = load_conversations(stage, tokenizer)
        assert (len(train), held) == (40, None)
    with pytest.raises(DataError) as error:
        load_conversations(make_stage(path, held_out=20), tokenizer)
    assert str(error.value) == (
        "sft: held_out: 20 of 20 distinct conversations leaves none to train on"
    )


def test_packed_conversations_are_whole_and_in_seeded_order(make_stage, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", CONVERSATIONS)
    stage = make_stage(path, name="mid", max_length=96, held_out=4)
    train, held_out = load_packed_conversations(stage, tokenizer)
    again, _ = load_packed_conversations(stage, tokenizer)
    assert train.rows == again.rows
    assert sorted(item for row in train.rows for item in row) == list(range(16))
    assert len(held_out) == 4 and set(held_out["source"][:]) == {path}
    assert len(train) < 16
    assert all(len(row["input_ids"]) <= 96 for row in [*train, *held_out])
    seen = [tokenizer.decode(row["input_ids"]) for row in [*train, *held_out]]
    parts = sorted("<|bos|>" + part for text in seen for part in text.split("<|bos|>")[1:])
    assert parts == sorted(rendered(row, tokenizer) for row in CONVERSATIONS)
    off = make_stage(path, name="mid", max_length=96)
    assert load_packed_conversations(off, tokenizer)[1] is None


@pytest.mark.parametrize(("copies", "seen"), [(0.5, 5), (1.0, 10), (2.5, 25)])
def test_weight_sees_exactly_that_many(tmp_path, make_stage, tokenizer, copies, seen):
    path = write_jsonl(tmp_path / "w.jsonl", CONVERSATIONS[:10])
    stage = make_stage(Source(path, weight=copies))
    train, _ = load_conversations(stage, tokenizer)
    counts = Counter(texts_of(train, tokenizer))
    assert len(train) == seen
    assert set(counts.values()) <= {int(copies), int(copies) + 1}
    again, _ = load_conversations(stage, tokenizer)
    assert texts_of(again, tokenizer) == texts_of(train, tokenizer)
    audit = json.loads((stage.folder / "data.json").read_text())
    assert (audit["train"], audit["sources"][0]["train"]) == (seen, seen)


def test_exact_duplicates_are_kept_or_dropped_and_counted(tmp_path, make_stage, tokenizer):
    one = write_jsonl(tmp_path / "one.jsonl", [*CONVERSATIONS[:5], CONVERSATIONS[0]])
    two = write_jsonl(tmp_path / "two.jsonl", CONVERSATIONS[3:8])
    for duplicates, sizes in (("keep", [6, 5]), ("drop", [5, 3])):
        stage = make_stage(one, two, duplicates=duplicates)
        train, _ = load_conversations(stage, tokenizer)
        audit = json.loads((stage.folder / "data.json").read_text())
        assert [source["kept"] for source in audit["sources"]] == sizes
        assert [source["duplicates"] for source in audit["sources"]] == [1, 2]
        assert len(train) == sum(sizes)
    assert [
        (entry["row"], entry["reason"]) for entry in read_jsonl(stage.folder / "rejected.jsonl")
    ] == [
        (5, "exact duplicate"),
        (0, "exact duplicate"),
        (1, "exact duplicate"),
    ]


def test_one_bad_row_in_a_hundred_is_skipped_and_two_are_an_error(tmp_path, make_stage, tokenizer):
    good = [conversation(f"Number {number}?") for number in range(199)]
    path = write_jsonl(tmp_path / "some.jsonl", [*good[:99], {"messages": []}])
    train, _ = load_conversations(make_stage(path), tokenizer)
    assert len(train) == 99
    with pytest.raises(DataError, match="1 of 100 rows are bad"):
        load_conversations(make_stage(path, on_bad_rows="error"), tokenizer)
    path = write_jsonl(tmp_path / "more.jsonl", [*good[:98], {"messages": []}, {"messages": []}])
    with pytest.raises(DataError, match="2 of 100 rows are bad"):
        load_conversations(make_stage(path), tokenizer)
    path = write_jsonl(tmp_path / "few.jsonl", [*good[:98], {"messages": []}])
    with pytest.raises(DataError, match="1 of 99 rows are bad"):
        load_conversations(make_stage(path), tokenizer)


def test_on_too_long(tmp_path, make_stage, tokenizer):
    long = {"messages": [m for c in CONVERSATIONS[:4] for m in c["messages"]]}
    path = write_jsonl(tmp_path / "long.jsonl", [CONVERSATIONS[5], long])
    one, whole = (
        len(encode_conversation(row["messages"], tokenizer)[0]) for row in (CONVERSATIONS[5], long)
    )
    limit = 2 * one
    assert limit < whole
    lengths = {}
    for policy in ("truncate", "drop", "split"):
        stage = make_stage(path, max_length=limit, on_too_long=policy)
        train, _ = load_conversations(stage, tokenizer)
        lengths[policy] = sorted(train.lengths)
        audit = json.loads((stage.folder / "data.json").read_text())["sources"][0]
        assert audit["read"] == 2
        assert (audit["truncated"], audit["split"]) == {
            "truncate": (1, 0),
            "drop": (0, 0),
            "split": (0, 1),
        }[policy]
    assert lengths["truncate"] == [one, limit]
    assert lengths["drop"] == [one]
    # two exchanges fit a row, behind one <|bos|>
    assert len(lengths["split"]) == 3 and max(lengths["split"]) <= limit
    assert sum(lengths["split"]) == one + whole + 1
    with pytest.raises(DataError, match=r"long\.jsonl: row 1 is longer than max_length"):
        load_conversations(make_stage(path, max_length=limit, on_too_long="error"), tokenizer)


# --- sources that need more ---


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


def test_rows_above_the_model_s_positions(tmp_path, make_stage, tokenizer, make_model):
    model = make_model(max_position_embeddings=32)
    model.save_pretrained(tmp_path / "model")
    path = write_jsonl(
        tmp_path / "r.jsonl", [CONVERSATIONS[0], conversation("Long?", "word " * 99)]
    )
    stage = make_stage(
        path, max_length=None, on_bad_rows="skip", model_name_or_path=str(tmp_path / "model")
    )
    train, _ = load_conversations(stage, tokenizer)
    assert len(train) == 1
    assert read_jsonl(stage.folder / "rejected.jsonl") == [
        {"source": path, "row": 1, "reason": "longer than the model's context"}
    ]


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
    assert lines[2].startswith("me/chats: cannot be loaded: Unknown split")
    for line, name in zip(lines[3:], ("none", "secret"), strict=True):
        assert line == (
            f"no dataset me/{name} here or on the Hub (a private one needs `hf auth login`)"
        )
