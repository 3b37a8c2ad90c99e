"""Replay: its share of an epoch, and the general conversations and text that are held out."""

import json
from collections import Counter

import pytest
from chat_rows import CONVERSATIONS, conversation, rendered, texts_of, write_jsonl

from hfsft.data.mixture import load_conversations, load_packed_conversations
from hfsft.data.replay import CHAT, TEXT, load_general
from hfsft.errors import DataError
from hfsft.recipe.schema import Replay

GENERAL = [conversation(f"General {number}?", f"It is {number}.") for number in range(100)]


@pytest.fixture
def own(tmp_path) -> str:
    return write_jsonl(tmp_path / "own.jsonl", CONVERSATIONS)


@pytest.fixture
def general(tmp_path) -> str:
    return write_jsonl(tmp_path / "general.jsonl", GENERAL)


def counted(train, tokenizer) -> tuple[list[str], Counter]:
    """The examples of the stage's own data, and how often each replayed one is among the rest."""
    texts = texts_of(train, tokenizer)
    replayed = {rendered(row, tokenizer) for row in GENERAL}
    return sorted(set(texts) - replayed), Counter(text for text in texts if text in replayed)


@pytest.mark.parametrize(("share", "count"), [(0.2, 5), (0.5, 20), (0.75, 60), (0.9, 180), (0, 0)])
def test_a_share_of_the_epoch_is_replayed(share, count, own, general, make_stage, tokenizer):
    stage = make_stage(own, replay=Replay(general, share=share, held_out=10))
    train, held_out = load_conversations(stage, tokenizer)
    kept, replayed = counted(train, tokenizer)
    assert held_out is None  # `held_out: 0` leaves nothing to validate, nor what is forgotten
    assert kept == sorted(rendered(row, tokenizer) for row in CONVERSATIONS)
    assert replayed.total() == count
    assert not replayed or max(replayed.values()) - min(replayed.values()) <= 1
    assert max(replayed.values(), default=0) == -(-count // 100)
    again, _ = load_conversations(stage, tokenizer)
    assert again["input_ids"][:] == train["input_ids"][:]


def test_what_is_held_out_is_in_no_training_row(own, general, make_stage, tokenizer, tmp_path):
    both = write_jsonl(tmp_path / "both.jsonl", CONVERSATIONS + GENERAL)
    stage = make_stage(both, held_out=4, replay=Replay(general, share=0.5, held_out=30))
    train, held_out = load_conversations(stage, tokenizer)
    measured = load_general(stage, tokenizer)
    assert measured["source"][:] == [CHAT] * 30 + [TEXT] * 30
    chat = set(texts_of(measured.select(range(30)), tokenizer))
    assert len(chat) == 30 and chat <= {rendered(row, tokenizer) for row in GENERAL}
    assert len(held_out) == 4
    trained = set(texts_of(train, tokenizer))
    assert not trained & (chat | set(texts_of(held_out, tokenizer)))
    text = measured.select(range(30, 60))
    assert {len(ids) for ids in text["input_ids"]} <= set(range(2, stage.max_length + 1))
    assert all(ids[0] == tokenizer.bos_token_id for ids in text["input_ids"])
    assert text["labels"][:] == text["input_ids"][:]
    # as in the stage itself, the loss of a conversation is that of the assistant's tokens
    first = measured[0]
    labels = [label for label in first["labels"] if label != -100]
    assert tokenizer.decode(labels).startswith("It is ")


def test_general_text_is_only_what_can_be_encoded(own, general, make_stage, tokenizer, tmp_path):
    rows = [{"text": text} for text in ("One.", " ", None, "a\ud800b", "Two.")]
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    stage = make_stage(own, held_out=4, replay=Replay(general, held_out=9, text=text))
    measured = load_general(stage, tokenizer)
    assert texts_of(measured.select(range(9, 11)), tokenizer) == ["<|bos|>One.", "<|bos|>Two."]


def test_the_stages_own_held_out_set_stays_the_same(own, general, make_stage, tokenizer):
    alone = load_conversations(make_stage(own, held_out=4), tokenizer)[1]
    stage = make_stage(own, held_out=4, replay=Replay(general))
    mixed = load_conversations(stage, tokenizer)[1]
    assert mixed["input_ids"][:] == alone["input_ids"][:]


def test_the_audit_counts_the_replayed_rows(own, general, make_stage, tokenizer):
    stage = make_stage(own, held_out=4, replay=Replay(general, share=0.5, held_out=30))
    load_conversations(stage, tokenizer)
    audit = json.loads((stage.folder / "data.json").read_text())
    columns = ("source", "read", "kept", "held_out", "train", "used")
    assert [[source[name] for name in columns] for source in audit["sources"]] == [
        [own, 20, 20, 4, 16, 16],
        [f"{general} (replay)", 100, 100, 30, 16, 16],
    ]


def test_mid_packs_replayed_rows_too(own, general, make_stage, tokenizer):
    stage = make_stage(own, name="mid", held_out=4, replay=Replay(general, share=0.5, held_out=30))
    train, _ = load_packed_conversations(stage, tokenizer)
    ids = [token for row in train for token in row["input_ids"]]
    text = tokenizer.decode(ids)
    assert text.count("General ") == text.count("Question ") == 16


def test_too_few_rows_to_replay_are_an_error(own, make_stage, tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", GENERAL[:1])
    stage = make_stage(own, held_out=4, replay=Replay(one))
    with pytest.raises(DataError, match="too few conversations to hold some out"):
        load_general(stage, tokenizer)
    assert load_general(make_stage(own, replay=Replay(one)), tokenizer) is None
    assert load_general(make_stage(own, held_out=4), tokenizer) is None
