"""A model's digest: the same wherever it lies, another for another model."""

import hashlib
import json
import shutil

from rigged import save

from hfsft.run.identity import model_digest


def test_a_model_is_known_by_its_files(tmp_path, make_model, tokenizer):
    save(make_model(), tokenizer, tmp_path / "one")
    digest = model_digest(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("not part of the model")
    assert model_digest(tmp_path / "two") == digest
    weights = tmp_path / "two" / "model.safetensors"
    content = weights.read_bytes()
    # hashes of a manifest count instead of hashing again
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = tmp_path / "two" / "manifest.json"
    manifest.write_text(json.dumps({"files": {weights.name: facts}}))
    assert model_digest(tmp_path / "two") == digest
    manifest.write_text(json.dumps({"files": {weights.name: facts | {"sha256": "0" * 64}}}))
    assert model_digest(tmp_path / "two") != digest
    manifest.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert model_digest(tmp_path / "two") != digest
