"""Which model a folder holds: a digest of its files, wherever the folder lies."""

import hashlib
import json
from functools import cache
from pathlib import Path

from hfsft.errors import CheckpointError
from hfsft.run.manifest import read_manifest

# the files of a model folder that its answers, and training from it, depend on
FINGERPRINTED = (
    "*.safetensors",
    *("config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt", "*.jinja"),
)


def model_digest(folder: Path) -> str:
    """A digest of a model's weights, configuration, tokenizer and template.

    Hashes that a `manifest.json` in the folder lists are not computed again.

    Args:
        folder: the model's; a copy of it elsewhere has the same digest.
    """
    try:
        listed = read_manifest(folder)["files"]
    except CheckpointError:
        listed = {}
    named = []
    for path in sorted({path for name in FINGERPRINTED for path in folder.glob(name)}):
        facts, status = listed.get(path.name), path.stat()
        known = facts["sha256"] if facts and facts["bytes"] == status.st_size else None
        named.append((path.name, known or _digest(path, status.st_size, status.st_mtime_ns)))
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    """The SHA-256 of a file, computed once for a size in bytes and a time in ns."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
