"""Base text: documents to rows, cached and streamed, and a stream that resumes at any row."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from chat_rows import read_jsonl, write_jsonl
from hub_server import HubServer
from plain_tokenizers import plain_bpe
from safetensors.torch import load_file

from hfsft.data import stream, text
from hfsft.data.stream import TextStream, open_text_stream
from hfsft.data.tasks import facts
from hfsft.data.text import base_texts, load_text
from hfsft.errors import DataError
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Recipe, Source, Stage
from hfsft.tokens.tokenizer import load_tokenizer

datasets.disable_progress_bars()


@pytest.fixture
def make_recipe(tmp_path):
    """Makes a recipe with a base stage of these sources and settings."""

    def make(data: list[dict], **settings) -> Recipe:
        path = tmp_path / "recipe.yaml"
        base = {"max_steps": 1, "max_length": 16, "held_out": 0, "tokens_per_step": None}
        recipe = {
            "output_dir": str(tmp_path),
            "model": {"depth": 2, "vocab_size": 512},
            "tokenizer": {"train": True},
            "base": {**base, "per_device_train_batch_size": 1, "data": data, **settings},
        }
        path.write_text(yaml.safe_dump(recipe))
        return load_recipe(str(path), "--quiet")

    return make


def documents(count: int, name: str = "doc") -> list[dict]:
    return [{"text": f"{name} {number} ends."} for number in range(count)]


def texts_of(rows, tokenizer) -> list[str]:
    """The documents in rows, each of which fits one."""
    return [
        text for row in rows for text in tokenizer.decode(row["input_ids"]).split("<|bos|>")[1:]
    ]


def test_documents_are_unsplit_in_rows_of_at_most_max_length(tmp_path, make_recipe, tokenizer):
    rows = documents(30)
    rows[5]["text"] = "a <|bos|> in it"
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    train, held_out = load_text(make_recipe([{"path": path}], max_length=24), tokenizer)
    assert held_out is None
    assert all(row["input_ids"][0] == 0 and len(row["input_ids"]) <= 24 for row in train)
    bos = [row["input_ids"].count(0) for row in train]
    assert sum(bos) == 30  # the <|bos|> written in a text is plain text
    decoded = "".join(tokenizer.decode(row["input_ids"]) for row in train)
    assert all(row["text"] in decoded for row in rows)
    tokens = sum(len(row["input_ids"]) for row in train)
    assert tokens / (24 * len(train)) > 0.8  # documents of 9 tokens
    again, _ = load_text(make_recipe([{"path": path}], max_length=24), tokenizer)
    assert again["input_ids"][:] == train["input_ids"][:]


def test_a_second_start_encodes_nothing(tmp_path, make_recipe, tokenizer, monkeypatch):
    calls = []
    encode = text.encode_texts
    monkeypatch.setattr(text, "encode_texts", lambda *a: calls.append(1) or encode(*a))
    path = write_jsonl(tmp_path / "once.jsonl", documents(20, "once"))
    first, _ = load_text(make_recipe([{"path": path}]), tokenizer)
    assert len(calls) == 1
    second, _ = load_text(make_recipe([{"path": path}]), tokenizer)
    assert len(calls) == 1
    assert second["input_ids"][:] == first["input_ids"][:]
    load_text(make_recipe([{"path": path}], max_length=32), tokenizer)
    assert len(calls) == 2
    write_jsonl(tmp_path / "once.jsonl", documents(21, "once"))
    changed, _ = load_text(make_recipe([{"path": path}]), tokenizer)
    assert len(calls) == 3
    assert len(texts_of(changed, tokenizer)) == 21


def test_base_audit_counts_what_was_read(tmp_path, make_recipe, tokenizer):
    rows = [*documents(20), {"text": " "}, {"text": None}, {"other": 1}, {"text": "\ud800"}, 5]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    other = write_jsonl(tmp_path / "e.jsonl", [{"body": f"other {n}"} for n in range(10)])
    recipe = make_recipe(
        [{"path": path, "repeat": 2}, {"path": other, "columns": {"text": "body"}}],
        on_bad_rows="skip",
    )
    train, _ = load_text(recipe, tokenizer)
    audit = json.loads((recipe.base.folder / "data.json").read_text())
    first, second = audit.pop("sources")
    assert audit == {
        "train": 50,
        "held_out": 0,
        "rows": len(train),
        "held_out_rows": 0,
        "tokens_a_row": 16,
    }
    assert (first["read"], first["kept"], first["train"]) == (25, 20, 40)
    assert first["refused"] == {"no text": 5}
    assert first["characters"] == sum(len(row["text"]) for row in rows[:20])
    assert (second["read"], second["kept"], second["train"]) == (10, 10, 10)
    assert read_jsonl(recipe.base.folder / "rejected.jsonl") == [
        {"source": path, "row": number, "reason": "no text"} for number in range(20, 25)
    ]
    kept = [row["text"] for row in rows[:20]] * 2 + [f"other {number}" for number in range(10)]
    assert Counter(texts_of(train, tokenizer)) == Counter(kept)
    assert list(base_texts(recipe.base)) == [
        *(row["text"] for row in rows[:20]),
        *(f"other {number}" for number in range(10)),
    ]


def test_held_out_documents_are_in_no_training_row(tmp_path, make_recipe, tokenizer):
    rows = documents(40)
    a = write_jsonl(tmp_path / "a.jsonl", rows)
    b = write_jsonl(tmp_path / "b.jsonl", rows[:20])
    recipe = make_recipe([{"path": a, "repeat": 2}, {"path": b}], held_out=10, eval_steps=1)
    train, held_out = load_text(recipe, tokenizer)
    held, trained = texts_of(held_out, tokenizer), Counter(texts_of(train, tokenizer))
    assert len(held) >= 10 and not set(held) & set(trained)
    in_b = {row["text"] for row in rows[:20]}
    assert trained == {
        row["text"]: 3 if row["text"] in in_b else 2 for row in rows if row["text"] not in held
    }
    audit = json.loads((recipe.base.folder / "data.json").read_text())
    assert [source["read"] for source in audit["sources"]] == [40, 20]
    # each document of the second source is one of the first's
    assert [source["duplicates"] for source in audit["sources"]] == [0, 20]
    assert (audit["rows"], audit["held_out_rows"]) == (len(train), len(held_out))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            documents(30),
            {"held_out": 30, "eval_steps": 1},
            "base: held_out: 30 of 30 distinct documents leaves none to train on",
        ),
        ([{"body": "x"}], {}, "d.jsonl: no row has any text under 'text'"),
        ([{"text": ""}], {}, "d.jsonl: no row has any text under 'text'"),
    ],
)
def test_unusable_base_text_is_an_error(rows, settings, message, tmp_path, make_recipe, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError) as error:
        load_text(make_recipe([{"path": path}], **settings), tokenizer)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_base_text_without_its_column(tmp_path, make_recipe, tokenizer):
    datasets.Dataset.from_list([{"body": "x", "id": 1}]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError) as error:
        load_text(make_recipe([{"path": str(tmp_path / "d.parquet")}]), tokenizer)
    assert str(error.value) == (
        f"{tmp_path}/d.parquet: has no column 'text', only body, id; name its text column with "
        "`columns: {text: YOUR_COLUMN}`"
    )


def test_a_text_that_arrow_did_not_look_into_is_an_error(tmp_path, make_recipe, tokenizer):
    raw = pa.py_buffer(b"\xff\xfe")
    offsets = pa.py_buffer(np.array([0, *[0] * 300, 2], dtype=np.int32))
    table = pa.Table.from_arrays([pa.StringArray.from_buffers(301, offsets, raw)], names=["text"])
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError) as error:
        load_text(make_recipe([{"path": str(tmp_path / "d.parquet")}]), tokenizer)
    assert str(error.value) == f"{tmp_path}/d.parquet: row 300 is not UTF-8 text"


def test_long_documents_are_laid_in_smaller_blocks(tmp_path, make_recipe, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "long.jsonl", documents(20, "long"))
    sizes = []
    encode = text.encode_texts
    monkeypatch.setattr(text, "encode_texts", lambda *a: sizes.append(len(a[0])) or encode(*a))
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 50)
    train, _ = load_text(make_recipe([{"path": path}]), tokenizer)
    assert sizes == [5, 5, 4, 4, 2]  # of 12 and, from the tenth on, 13 characters
    assert sorted(texts_of(train, tokenizer)) == sorted(
        row["text"] for row in documents(20, "long")
    )


def test_what_is_kept_of_a_document_is_a_few_bytes(tmp_path, make_recipe, tokenizer):
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": f"{n}"} for n in range(60_000)])
    recipe = make_recipe([{"path": path}], held_out=10, eval_steps=1)
    sources = [text._text_rows(source, recipe.base) for source in recipe.base.data]
    tracemalloc.start()
    chosen, held, _, _ = text._choose(recipe.base, sources)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(chosen[0]), len(held[0])) == (59_990, 10)
    assert kept < 10 * 60_000  # bytes; as a list of integers 36 each
    assert peak < 60 * 60_000  # with digests in lists and a set 146 each


# --- streams ---

SOURCE = Source("me/text", streaming=True, columns={"text": "body"})


def streaming_stage(make_stage, **settings) -> Stage:
    return make_stage(SOURCE, name="base", **{"max_length": None, **settings})


def streamed(rows: list[dict]) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


def bodies(count: int) -> list[dict]:
    return [{"body": row["text"]} for row in documents(count)]


def test_a_stream_is_endless_and_holds_its_first_documents_out(make_stage, tokenizer):
    rows = bodies(50)
    rows[3]["body"] = None
    rows[40]["body"] = rows[1]["body"]  # a copy of one that is held out
    rows[41]["body"] = " "
    stage = streaming_stage(make_stage, held_out=5)
    train, held_out = open_text_stream(stage, streamed(rows), tokenizer, 16)
    assert sorted(texts_of(held_out, tokenizer)) == [rows[n]["body"] for n in (0, 1, 2, 4)]
    kept = Counter(rows[n]["body"] for n in range(5, 50) if n not in (40, 41))
    taken = [row["input_ids"] for row in islice(iter(train), 300)]
    found = texts_of(({"input_ids": ids} for ids in taken), tokenizer)
    epochs = [found[start : start + len(kept)] for start in range(0, 3 * len(kept), len(kept))]
    assert [Counter(epoch) for epoch in epochs] == [kept] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    again = open_text_stream(stage, streamed(rows), tokenizer, 16)[0]
    assert [row["input_ids"] for row in islice(iter(again), 300)] == taken


def test_a_stream_resumes_at_any_row(tokenizer):
    def stream() -> TextStream:
        return TextStream(streamed(bodies(60)), SOURCE, tokenizer, 16, 7, set(), block=9)

    uninterrupted = stream()
    taken = [row["input_ids"] for row in islice(iter(uninterrupted), 200)]
    for stop in (0, 1, 7, 31, 60, 150):
        interrupted = stream()
        iterator = iter(interrupted)
        # a data loader reads ahead of training
        assert [row["input_ids"] for row in islice(iterator, stop + 3)] == taken[: stop + 3]
        state = json.loads(json.dumps(interrupted.state_after(stop)))
        resumed = stream()
        resumed.resume(state)
        iterator = iter(resumed)
        rest = [row["input_ids"] for row in islice(iterator, 40)]
        assert rest == taken[stop : stop + 40]
        # and resumed once more from there
        third = stream()
        third.resume(json.loads(json.dumps(resumed.state_after(stop + 20))))
        assert next(iter(third))["input_ids"] == taken[stop + 20]


def test_without_a_bos_token_a_document_starts_with_the_eos_token(
    tmp_path, make_recipe, make_stage
):
    plain = plain_bpe("<|im_start|>", "<|im_end|>")  # as Qwen's
    plain.save_pretrained(tmp_path / "plain")
    tokenizer = load_tokenizer(str(tmp_path / "plain"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token) == (None, "<|im_end|>")
    path = write_jsonl(tmp_path / "d.jsonl", documents(30))
    train, _ = load_text(make_recipe([{"path": path}], max_length=24), tokenizer)
    stage = streaming_stage(make_stage, held_out=5)
    rows, held_out = open_text_stream(stage, streamed(bodies(50)), tokenizer, 24)
    for row in (*train, *held_out, *islice(iter(rows), 9)):
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith("<|im_end|>doc ") and text.endswith(" ends.")


@pytest.mark.parametrize(
    ("rows", "held_out", "message"),
    [
        (bodies(20), 0.1, "base.held_out: 0.1 is a share, but a stream's length is not known;"),
        ([{"body": ""}] * 9, 2, "base: held_out: the first 2 documents have no text"),
        ([{"body": ""}] * 9, 0, "me/text: has no text except what is held out"),
    ],
)
def test_an_unusable_stream_is_an_error(rows, held_out, message, make_stage, tokenizer):
    stage = streaming_stage(make_stage, held_out=held_out)
    with pytest.raises(DataError) as error:
        next(iter(open_text_stream(stage, streamed(rows), tokenizer, 16)[0]))
    assert str(error.value).startswith(message)


def test_a_stream_must_be_alone_and_on_the_hub(tmp_path, make_recipe, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", documents(5))
    recipe = make_recipe([{"path": path, "streaming": True}, {"path": path}])
    with pytest.raises(DataError, match=r"^base.data: a streaming source must be the only one$"):
        load_text(recipe, tokenizer)
    recipe = make_recipe([{"path": path, "streaming": True}])
    with pytest.raises(DataError, match=r"d.jsonl: streaming is for datasets on the Hub; remove"):
        load_text(recipe, tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["d.jsonl", "recipe.yaml"]


def test_base_streams_from_the_hub_and_resumes_bit_exactly(tmp_path):
    recipe = {
        "model": {"depth": 1, "vocab_size": 300, "max_position_embeddings": 64},
        "tokenizer": {"train": True},
        "base": {
            "data": [{"path": "me/text", "streaming": True}],
            "held_out": 20,
            "max_length": 32,
            "per_device_train_batch_size": 2,
            "tokens_per_step": 128,
            "max_steps": 8,
            "logging_steps": 1,
            "save_steps": 4,
        },
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    rows = "".join(json.dumps({"text": fact}) + "\n" for fact in facts()[:300])
    with HubServer() as hub:
        hub.add_repo("me/text", "dataset", {"train.jsonl": rows.encode()})

        def base(name: str, *more: str) -> subprocess.Popen:
            return subprocess.Popen(
                [sys.executable, "-m", "hfsft.base", "r.yaml", "--name", name, *more],
                cwd=tmp_path,
                env=hub.env(tmp_path, "hf_read"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        straight = base("straight")
        assert straight.wait(timeout=200) == 0, straight.stderr.read()
        # each worker would yield every row, and none would report its position
        interrupted = base("interrupted", "--dataloader_num_workers", "2")
        for line in interrupted.stdout:
            if "step 2/8" in line:
                interrupted.send_signal(signal.SIGTERM)
        assert interrupted.wait(timeout=200) == 143, interrupted.stderr.read()
        again = base("interrupted")
        assert again.wait(timeout=200) == 0, again.stderr.read()
        # as if killed between its last checkpoint and saving its model: no step is left
        runs = tmp_path / "runs"
        shutil.copytree(runs / "straight", runs / "late")
        (runs / "late/base/model.safetensors").unlink()
        record = json.loads((runs / "late/base/stage.json").read_text())
        (runs / "late/base/stage.json").write_text(json.dumps(record | {"status": "running"}))
        late = base("late")
        assert late.wait(timeout=200) == 0, late.stderr.read()
    names = ("straight", "interrupted", "late")
    states = [load_file(runs / name / "base/model.safetensors") for name in names]
    logs = [
        [line.get("loss") for line in read_jsonl(runs / name / "base/metrics.jsonl")]
        for name in names
    ]
    for state, log in zip(states[1:], logs[1:], strict=True):
        assert all(torch.equal(states[0][key], state[key]) for key in state)
        assert log == logs[0]
