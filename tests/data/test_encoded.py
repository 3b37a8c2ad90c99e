"""Conversations encoded on demand: truncated, split, refused, and cached."""

import json
from pathlib import Path

import datasets
import pytest
from chat_rows import (
    CONVERSATIONS,
    MIXED,
    as_parquet,
    conversation,
    mixed,
    read_jsonl,
    texts_of,
    used_rows,
    write_jsonl,
)

from hfsft.data.mixture import load_conversations
from hfsft.errors import DataError
from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import IGNORED, encode_conversation


def test_a_truncated_conversation_keeps_a_trained_token_or_is_refused(
    make_stage, tokenizer, tmp_path
):
    row = conversation("Hello there?", "Yes indeed.")
    ids, labels = encode_conversation(row["messages"], tokenizer)
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
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
        # only replacements for rows that are too long are encoded in addition
        excluded = sum(sum(source["passed_over"].values()) for source in audit["sources"])
        assert 0 < excluded < 0.25 * used
        rejected = read_jsonl(stage.folder / "rejected.jsonl")
        assert sum(entry["reason"] == "longer than max_length" for entry in rejected) == excluded
        # a longer run starts with the same examples
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


def test_encoding_in_several_processes_changes_nothing(make_stage, tokenizer, tmp_path):
    rows = [conversation(f"Number {number}?") for number in range(1100)]
    path = write_jsonl(tmp_path / "many.jsonl", rows)
    alone, _ = load_conversations(make_stage(path), tokenizer)
    path = write_jsonl(tmp_path / "copy.jsonl", [*rows, rows[0]])  # so that nothing is cached
    several, _ = load_conversations(
        make_stage(path, dataset_num_proc=2, duplicates="drop"), tokenizer
    )
    assert [*several] == [*alone]


def test_rows_truncated_to_held_out_tokens_are_not_trained_on(make_stage, tokenizer, tmp_path):
    rows = [
        conversation(f"Question {n // 2}?", "word " * 40 + "ab"[n % 2]) for n in range(20)
    ]  # pairs that share their first 48 tokens
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    for settings in ({"max_steps": 4, "examples_per_step": 4}, {}):
        stage = make_stage(path, held_out=3, max_length=48, **settings)
        train, held_out = load_conversations(stage, tokenizer)
        held = texts_of(held_out, tokenizer)
        assert len(held) == 3 and not set(held) & set(texts_of(train, tokenizer))
        reasons = {entry["reason"] for entry in read_jsonl(stage.folder / "rejected.jsonl")}
        assert reasons == {"the same tokens as a held-out conversation"}


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
            '{"name": "f", "arguments": {"a": 1}}<|python_end|><|assistant_end|>'
            "<|output_start|>5<|output_end|><|assistant_start|>Five<|assistant_end|>"
        ]
        * 3
    )


def test_keys_that_arrow_added_are_no_part_of_tools_and_arguments(make_stage, tokenizer, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi", "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": {name: 1}}}],
                },
            ],
            "tools": [{"name": "f", "parameters": {"properties": {name: {"type": "integer"}}}}],
        }
        for name in ("a", "b")
    ]
    path = tmp_path / "m.parquet"
    path.write_bytes(as_parquet(rows))
    train, _ = load_conversations(make_stage(str(path), max_length=256), tokenizer)
    texts = sorted(texts_of(train, tokenizer))
    assert texts == [
        "<|bos|><|user_start|>Functions that can be called:\n"
        f'{{"name": "f", "parameters": {{"properties": {{"{name}": {{"type": "integer"}}}}}}}}\n\n'
        "Hi<|user_end|><|assistant_start|><|python_start|>"
        f'{{"name": "f", "arguments": {{"{name}": 1}}}}<|python_end|><|assistant_end|>'
        for name in ("a", "b")
    ]


def test_all_tokens_train_without_assistant_only(make_stage, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", CONVERSATIONS)
    train, _ = load_conversations(make_stage(path, assistant_only_loss=False), tokenizer)
    assert all(row["labels"] == row["input_ids"] for row in train)


def test_on_too_long(tmp_path, make_stage, tokenizer):
    long = {"messages": [m for c in CONVERSATIONS[:4] for m in c["messages"]]}
    path = write_jsonl(tmp_path / "long.jsonl", [CONVERSATIONS[5], long])
    one, full = (
        len(encode_conversation(row["messages"], tokenizer)[0]) for row in (CONVERSATIONS[5], long)
    )
    limit = 2 * one
    assert limit < full
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
    # two exchanges fit one part, after one <|bos|>
    assert len(lengths["split"]) == 3 and max(lengths["split"]) <= limit
    assert sum(lengths["split"]) == one + full + 1
    with pytest.raises(DataError, match=r"long\.jsonl: row 1 is longer than max_length"):
        load_conversations(make_stage(path, max_length=limit, on_too_long="error"), tokenizer)


def test_rows_beyond_the_model_s_context(tmp_path, make_stage, tokenizer, make_model):
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
