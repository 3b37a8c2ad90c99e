"""Hostile rows: each is refused by index and reason, and none of it is trained on."""

import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from chat_rows import CONVERSATIONS

from hfsft.data import encoded
from hfsft.data.mixture import load_conversations
from hfsft.data.text import load_text
from hfsft.errors import DataError
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import encode_conversation

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def turns(*contents) -> bytes:
    roles = ("user", "assistant")
    return json.dumps(
        {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}
    ).encode()


def row(messages, **more) -> bytes:
    return json.dumps({"messages": messages} | more).encode()


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
    "10,000 levels in another column": (
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
        turns("Hi", [{"type": "text", "values": "hi"}]),
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
def test_a_bad_row_is_refused_by_index_and_reason(case, tmp_path, make_stage, tokenizer):
    line, reason = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    good = [CONVERSATIONS[0], CONVERSATIONS[1]]
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
    "alpaca: a number as input": (ALPACA, {"input": 5}, NOT_TEXT),
    "alpaca: a mapping as input": (ALPACA, {"input": {"a": 1}}, NOT_TEXT),
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
    "pair: to avoid": (PAIR, {"label": False}, "an answer to avoid (label: false)"),
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
    "a label of another kind": row([USER, ASSISTANT], label="sports"),
    "NaN in another column": turns("Hi", "Hello")[:-1] + b', "score": NaN, "more": -Infinity}',
    "a repeated key, of which the last counts": b'{"messages": null, ' + turns("Hi", "Hello")[1:],
    "odd other columns": turns("Hi", "Hello")[:-1]
    + b', "": 1, "a.b": 2, "\\u0000": 3, "\xc3\xa9": 4}',
    "columns with our names": turns("Hi", "Hello")[:-1] + b', "hfsft_row": "x", "input_ids": "y"}',
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_an_unusual_but_valid_row_is_trained_on(case, tmp_path, make_stage, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD_ROWS[case])
    train, _ = load_conversations(make_stage(str(path), name="mid"), tokenizer)
    expected = encode_conversation([USER, ASSISTANT], tokenizer)
    assert [(row["input_ids"], row["labels"]) for row in train] == [expected]


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_giant_rows_are_truncated_or_split(policy, tmp_path, make_stage, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([turns("Hi", "a" * 5_000_000), turns(*["Hi", "Hello"] * 10_000)]))
    stage = make_stage(str(path), name="mid", on_too_long=policy)
    train, _ = load_conversations(stage, tokenizer)
    audit = json.loads((stage.folder / "data.json").read_text())["sources"][0]
    assert audit["read"] == 2 and not audit["refused"]
    assert max(train["length"]) <= 64
    if policy == "split":
        exchange = len(encode_conversation([USER, ASSISTANT], tokenizer)[0])
        per_row = (64 - 1) // (exchange - 1)  # after one <|bos|>
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
def test_a_bad_text_is_refused_by_index_and_reason(case, tmp_path, tokenizer):
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


LINES = b"".join(json.dumps(one).encode() + b"\n" for one in CONVERSATIONS)


def parquet_table(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pa.parquet.write_table(table, written)
    return written.getvalue()


def test_images_are_refused_and_not_decoded(tmp_path, make_stage, tokenizer):
    """Decoding them takes packages that may not be installed."""
    features = datasets.Features(datasets.Dataset.from_list([CONVERSATIONS[0]]).features)
    for name, feature, values in (
        ("image", datasets.Image(), [{"bytes": b"x", "path": None}, None]),
        ("images", datasets.List(datasets.Image()), [[{"bytes": b"x", "path": None}], []]),
        ("audio", datasets.Audio(), [{"bytes": b"x", "path": None}, None]),
    ):
        columns = {
            "messages": [CONVERSATIONS[0]["messages"], CONVERSATIONS[1]["messages"]],
            name: values,
        }
        schema = datasets.Features(features | {name: feature}).arrow_schema
        (tmp_path / "r.parquet").write_bytes(parquet_table(pa.table(columns, schema=schema)))
        stage = make_stage(str(tmp_path / "r.parquet"), name="mid", on_bad_rows="skip")
        assert len(load_conversations(stage, tokenizer)[0]) == 1
        (refused,) = (json.loads(line) for line in (stage.folder / "rejected.jsonl").open())
        assert (refused["row"], refused["reason"]) == (0, "has images, video or audio")


def test_a_weight_that_leaves_nothing_is_an_error(tmp_path, make_stage, tokenizer):
    (tmp_path / "r.jsonl").write_text(json.dumps(CONVERSATIONS[0]))
    stage = make_stage(Source(str(tmp_path / "r.jsonl"), weight=0.1), name="mid")
    with pytest.raises(DataError, match=r"^mid: no row is left to train on; `weight` is too small"):
        load_conversations(stage, tokenizer)


def test_the_reasons_are_written_when_no_row_is_left(tmp_path, make_stage, tokenizer):
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


# --- rows that are left out on purpose, and what nothing reads ---


def test_answers_to_avoid_are_left_out_and_are_not_bad_rows(tmp_path, make_stage, tokenizer):
    path = tmp_path / "kto.jsonl"
    lines = [row([USER, {"role": "assistant", "content": f"Hello {n}"}], label=n % 2 == 0)
             for n in range(6)]  # fmt: skip
    lines.append(row([USER, ASSISTANT], weight=0))
    path.write_bytes(b"\n".join(lines))
    stage = make_stage(str(path), name="mid")  # any bad row of so few would be an error
    train, _ = load_conversations(stage, tokenizer)
    assert len(train) == 3
    (source,) = json.loads((stage.folder / "data.json").read_text())["sources"]
    assert source["refused"] == {
        "an answer to avoid (label: false)": 3,
        "marked as not to train on (weight)": 1,
    }


def test_what_nothing_reads_is_named_once_with_its_count(tmp_path, make_stage, tokenizer, capsys):
    path = tmp_path / "rows.jsonl"
    named = {"role": "user", "content": "Who?", "name": "Anna"}
    lines = [row([USER, ASSISTANT], score=5), row([named, ASSISTANT], score=None)]
    path.write_bytes(b"\n".join(lines))
    stage = make_stage(str(path), name="mid", quiet=False)
    load_conversations(stage, tokenizer)
    (audit,) = json.loads((stage.folder / "data.json").read_text())["sources"]
    assert audit["unused"] == {"column score": 1, "field name": 1}
    assert "not used: column score (1), field name (1)" in capsys.readouterr().out
