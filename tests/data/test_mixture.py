"""What becomes of each row: kept, refused, repeated, held out, and in which order it is used."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from chat_rows import (
    CONVERSATIONS,
    MIXED,
    conversation,
    mixed,
    read_jsonl,
    rendered,
    texts_of,
    used_rows,
    write_jsonl,
)

from hfsft.data.mixture import load_conversations, load_packed_conversations
from hfsft.errors import DataError
from hfsft.recipe.schema import Source
from hfsft.tokens.encoding import IGNORED, encode_conversation

LONG = conversation("Long?", "word " * 200)
TEN_LINES = [
    json.dumps(CONVERSATIONS[0]),
    '{"messages": [',
    json.dumps(LONG),
    json.dumps({"messages": []}),
    json.dumps(conversation("word " * 200, "No.")),
    json.dumps({"other": 1}),
    "[1]",
    json.dumps(CONVERSATIONS[1]),
    json.dumps(conversation("Hi", "")),
    json.dumps({"messages": []}),
]
TEN_REASONS = {
    1: "not JSON",
    3: "no messages",
    4: "nothing left to train on",
    5: "not a row of format messages",
    6: "not a JSON object",
    8: "empty content",
    9: "no messages",
}


def test_bad_rows_are_an_error_that_names_the_first(tmp_path, make_stage, tokenizer):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(TEN_LINES))
    stage = make_stage(str(path), max_length=48)
    with pytest.raises(DataError) as error:
        load_conversations(stage, tokenizer)
    assert str(error.value) == (
        f"{path}: 6 of 10 rows are bad, the first is row 1 (not JSON)\n  All are listed in "
        f"{stage.folder / 'rejected.jsonl'}; to train on the rest: --on_bad_rows skip"
    )


def test_refused_rows_are_listed_and_data_json_counts(tmp_path, make_stage, tokenizer):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(TEN_LINES))
    other = write_jsonl(tmp_path / "other.jsonl", CONVERSATIONS[2:12])
    sources = (str(path), Source(other, rows=5, repeat=3))
    stage = make_stage(*sources, max_length=48, on_bad_rows="skip")
    train, _ = load_conversations(stage, tokenizer)

    source = str(path)
    assert read_jsonl(stage.folder / "rejected.jsonl") == [
        {"source": source, "row": index, "reason": reason} for index, reason in TEN_REASONS.items()
    ]
    kept = [encode_conversation(r["messages"], tokenizer) for r in (CONVERSATIONS[0], LONG)]
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
        "passed_over": {"nothing left to train on": 1},
        "unused": {},
        "left_out": {},
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
    # epochs: as many steps as they take
    for epochs, examples, count in ((1, 8, 24), (2.5, 10, 50), (0.01, 6, 6)):
        trainer = {"num_train_epochs": epochs}
        stage = make_stage(path, examples_per_step=examples, trainer=trainer)
        train, _ = load_conversations(stage, tokenizer)
        assert used_rows(train, tokenizer) == expected[:count]


def order_by_hand(
    sources: list[Source], names: list[list[str]], held: set[str]
) -> list[tuple[int, int]]:
    """The trainable rows of three epochs in the run's order, computed independently."""
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
    return by_hand


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
    questions = used_rows(train, tokenizer)
    assert len(held) == audit["held_out"] == 30
    assert not held & set(questions)
    by_hand = order_by_hand(sources, names, held)[: 25 * 8]
    assert questions == [names[index][row] for index, row in by_hand]

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
        assert counted["passed_over"] == {
            "longer than max_length": refused.count("longer than max_length")
        }
        numbers = [
            counted[key] for key in ("read", "kept", "held_out", "train", "used", "prepared")
        ]
        assert any(" ".join(map(str, numbers)) in " ".join(line.split()) for line in shown)
    assert sum(counted["used"] for counted in audit["sources"]) == audit["used"] == len(questions)
    assert sum(counted["held_out"] for counted in audit["sources"]) == 30
    assert audit["train"] == sum(counted["train"] for counted in audit["sources"])
    seen = [*(train.conversations[item] for item in sorted(set(train.indices))), *held_out]
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


RUN_ORDER = """
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
    (tmp_path / "run_order.py").write_text(RUN_ORDER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", str(tmp_path / "run_order.py"), json.dumps(settings)),
            *(str(tmp_path / "tokenizer"), str(tmp_path)),
        ],
        # an empty cache, so that one process fills it while the other waits
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


def test_all_parts_of_a_held_out_row_are_held_out(make_stage, tokenizer, tmp_path):
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


def test_held_out_conversations_are_in_no_training_row(make_stage, tokenizer, tmp_path):
    # 20 distinct ones; b repeats 10 of them, and c one of those five times
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


def test_packed_conversations_are_unsplit_and_in_seeded_order(make_stage, tokenizer, tmp_path):
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
def test_weight_gives_exactly_that_many_examples(tmp_path, make_stage, tokenizer, copies, seen):
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
