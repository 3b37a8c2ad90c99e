"""What `hfsft data` shows, before anything trains."""

import json

import pytest
import yaml

from hfsft.cli import app
from hfsft.preview import pieces, preview
from hfsft.recipe import load_recipe

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
        trained = [piece["text"] for piece in example if piece["trained"]]
        word, spelled = trained[0].removesuffix("<|assistant_end|>").split(":")
        assert spelled.split(",") == list(word)
        assert example[0]["text"] == f"<|bos|><|user_start|>Spell the word: {word}" + (
            "<|user_end|><|assistant_start|>"
        )
    assert all(piece["trained"] for piece in seen["base"]["examples"][0])


def test_pieces_put_the_example_together_again(tokenizer):
    ids = tokenizer.encode("one two three")
    labels = [-100, *ids[1:2], *[-100] * (len(ids) - 2)]
    cut = pieces({"input_ids": ids, "labels": labels}, tokenizer)
    assert [piece["trained"] for piece in cut] == [False, True, False]
    assert "".join(piece["text"] for piece in cut) == "one two three"


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
