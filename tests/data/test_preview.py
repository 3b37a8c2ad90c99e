"""What `hfsft data` shows, before anything trains."""

import io
import json
from collections import Counter

import pytest
import yaml
from rich.console import Console

from hfsft.cli import app
from hfsft.data.audit import audit_source, print_audit
from hfsft.data.mixture import load_conversations
from hfsft.data.preview import preview, text_segments
from hfsft.errors import DataError
from hfsft.recipe.loading import load_recipe

RECIPE = {
    "name": "seen",
    "model": {"depth": 1, "vocab_size": 300, "max_position_embeddings": 96},
    "tokenizer": {"train": True},
    "base": {"data": [{"path": "facts", "rows": 50}], "max_steps": 1, "max_length": 64},
    "mid": {"data": [{"path": "small_talk", "rows": 20}], "max_steps": 1, "max_length": 96},
    "sft": {"data": [{"path": "simple_spelling", "rows": 20}], "max_length": 96},
}


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "seen.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "runs")}))
    return str(path)


def test_preview_counts_what_will_be_trained_on_and_writes_nothing(recipe, tmp_path):
    seen = preview(load_recipe(recipe), show=2)
    assert list(seen) == ["base", "mid", "sft"]
    assert [data["audit"]["train"] for data in seen.values()] == [49, 19, 19]
    assert [len(data["examples"]) for data in seen.values()] == [2, 2, 2]
    assert not (tmp_path / "runs").exists()
    for example in seen["sft"]["examples"]:
        trained = [segment["text"] for segment in example if segment["trained"]]
        word, spelled = trained[0].removesuffix("<|assistant_end|>").split(":")
        assert spelled.split(",") == list(word)
        assert example[0]["text"] == f"<|bos|><|user_start|>Spell the word: {word}" + (
            "<|user_end|><|assistant_start|>"
        )
    assert all(segment["trained"] for segment in seen["base"]["examples"][0])


def test_examples_are_the_first_of_the_run(recipe):
    loaded = load_recipe(recipe, "--sft.max_steps", "3", "--sft.examples_per_step", "4")
    few, many = (preview(loaded, show)["sft"]["examples"] for show in (2, 50))
    assert len(many) == 12 and many[:2] == few
    rows = preview(load_recipe(recipe, "--sft.max_steps", "1"), 50)["mid"]["examples"]
    assert len(rows) == 19


def test_the_table_fits_a_hundred_columns_whatever_the_numbers():
    counts = {"held_out": 5_000, "copies_of_held_out": 3, "train": 9_000_000, "used": 6_400}
    source = audit_source(
        "HuggingFaceTB/a-dataset-with-quite-a-long-name:and-a-configuration",
        read=9_000_000,
        kept=8_999_000,
        lengths=[100_000] * 64,
        trained_tokens=3_200_000,
        reasons=Counter({"no messages": 1_000}),
        excluded=Counter({"longer than max_length": 17}),
    )
    sizes = {"train": 9_000_000, "held_out": 5_000, "used": 6_400, "different": 6_000}
    audit = {"sources": [source | counts | {"copies": 2.0}], "examples_per_step": 32, **sizes}
    written = io.StringIO()
    print_audit("sft", audit, Console(file=written, width=100, highlight=False))
    lines = written.getvalue().splitlines()
    assert "…" not in written.getvalue()
    table = lines[: next(i for i, line in enumerate(lines) if ": 1,000 refused" in line)]
    assert max(map(len, table)) <= 100
    assert "".join(line.split()[0] for line in table[1:]) == source["source"]
    row = " ".join(lines[1].split()[1:])
    assert row == ("9,000,000 8,999,000 5,000 9,000,000 6,400 64 6,400,000 50% 100,000 100,000 0")
    name = source["source"]
    assert [line for line in lines if line.startswith(name)] == [
        f"{name}: 1,000 refused: no messages",
        f"{name}: 17 excluded: longer than max_length",
        f"{name}: 3 excluded: exact copies of held-out conversations",
        f"{name}: each seen 2 times per epoch",
    ]
    assert lines[-2] == "tokens, median, max and long cover the 64 prepared"
    assert lines[-1] == (
        "9,000,000 conversations to train on, 5,000 held out; this run's 200 steps of 32 use "
        "6,000, 6,400 times in total"
    )


def test_segments_join_to_the_example(tokenizer):
    ids = tokenizer.encode("one two three")
    labels = [-100, *ids[1:2], *[-100] * (len(ids) - 2)]
    segments = text_segments({"input_ids": ids, "labels": labels}, tokenizer)
    assert [segment["trained"] for segment in segments] == [False, True, False]
    assert "".join(segment["text"] for segment in segments) == "one two three"


def test_command_prints_a_table_or_json(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        app(["data", recipe, "--show", "1"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "simple_spelling" in shown and "19 conversations to train on, 1 held out" in shown
    assert "example 1 (bold is trained on)" in shown and "<|assistant_end|>" in shown
    with pytest.raises(SystemExit):
        app(["data", recipe, "--json", "--sft.held_out", "5"])
    assert json.loads(capsys.readouterr().out)["sft"]["audit"]["held_out"] == 5


def bad_rows(tmp_path, bad: int) -> str:
    """A recipe whose sft has 20 rows, some of them bad."""
    rows = [
        {"prompt": f"What is {n}?", "completion": "" if n < bad else "A number."} for n in range(20)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = RECIPE | {"sft": {"data": [{"path": str(path)}], "max_length": 96, "max_steps": 1}}
    (tmp_path / "bad.yaml").write_text(
        yaml.safe_dump(made | {"output_dir": str(tmp_path / "runs")})
    )
    return str(tmp_path / "bad.yaml")


def test_what_training_would_refuse_is_said_first(tmp_path, capsys):
    recipe = bad_rows(tmp_path, 3)
    app(["data", recipe], standalone_mode=False)
    said = capsys.readouterr().out
    mine = said[said.index("sft: training would stop: ") :]
    assert mine.startswith(
        f"sft: training would stop: {tmp_path}/chats.jsonl: 3 of 20 rows are bad, the first is "
        "row 0 (empty content)\nTo train on the rest: --on_bad_rows skip\n"
    )
    assert said.count("training would stop") == 1
    app(["data", recipe, "--json"], standalone_mode=False)
    seen = json.loads(capsys.readouterr().out)
    assert [data["refused"] is None for data in seen.values()] == [True, True, False]
    app(["data", recipe, "--sft.on_bad_rows", "skip"], standalone_mode=False)
    assert "training would stop" not in capsys.readouterr().out


def test_a_refusal_comes_without_a_table(tmp_path, make_stage, tokenizer, capsys):
    bad_rows(tmp_path, 3)
    stage = make_stage(str(tmp_path / "chats.jsonl"), quiet=False)
    with pytest.raises(DataError, match="3 of 20 rows are bad"):
        load_conversations(stage, tokenizer)
    assert capsys.readouterr().out == ""
