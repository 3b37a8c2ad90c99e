"""What a checkpoint holds of its data, to notice on resume that it changed."""

import json

import pytest
import yaml

from hfsft.data.text import load_text
from hfsft.recipe.loading import load_recipe
from hfsft.train.checkpointing import data_fingerprint

DOCUMENTS = [{"text": f"Document {number} tells of the number {number}."} for number in range(60)]


@pytest.fixture
def fingerprint(tmp_path, tokenizer, monkeypatch):
    """The fingerprint of a base stage's text, from an empty cache that `code` has filled."""

    def made(documents, code="one", length=64):
        monkeypatch.setattr("hfsft.data.cache.code_digest", lambda: code)
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in documents))
        recipe = {
            "output_dir": str(tmp_path),
            "model": {"depth": 2, "vocab_size": 512, "max_position_embeddings": 64},
            "tokenizer": {"path": str(tmp_path)},
            "base": {"data": [str(path)], "held_out": 0, "max_steps": 1, "max_length": length},
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        train, _ = load_text(load_recipe(str(tmp_path / "r.yaml"), "--quiet"), tokenizer)
        return data_fingerprint(train)

    return made


def test_base_text_is_the_same_whatever_code_and_cache_it_came_through(fingerprint, tokenizer):
    first = fingerprint(DOCUMENTS)
    assert first["examples"] > 10
    tokenizer.backend_tokenizer.enable_padding()  # as a batch elsewhere leaves it
    assert fingerprint(DOCUMENTS, code="another") == first


def test_changed_base_text_is_noticed(fingerprint):
    first = fingerprint(DOCUMENTS)
    changed = [*DOCUMENTS[:50], {"text": "Document 50 tells of the number 51."}, *DOCUMENTS[51:]]
    assert fingerprint(changed)["digest"] != first["digest"]
    assert fingerprint(DOCUMENTS, length=32)["digest"] != first["digest"]
