"""The card of a folder of GGUF files: the model's own, and how to run each file."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfsft.run.disk import shown
from hfsft.run.files import write_text_atomically

HEADING = "## As GGUF"


def gguf_card(name: str, own: str, exported: list[dict[str, Any]]) -> str:
    """The README.md of a folder of GGUF files.

    Args:
        name: the model's.
        own: the model's own card; "" if it has none.
        exported: the proof of each file, with its `file`, `type` and `bytes`.
    """
    first = exported[0]["file"]
    rows = "\n".join(
        f"| `{one['file']}` | {one['type']} | {shown(one['bytes'])} | {_proof(one)} |"
        for one in exported
    )
    return f"""{own.partition(HEADING)[0].rstrip() or f"# {name}"}

{HEADING}

| file | weights | size | proved when it was written |
|---|---|---|---|
{rows}

With [llama.cpp](https://github.com/ggml-org/llama.cpp), in a terminal, or as a web page with an
OpenAI-compatible endpoint:

    llama-cli -m {first}
    llama-server -m {first}

With [Ollama](https://ollama.com), where the `Modelfile` is:

    ollama create {name} -f Modelfile
    ollama run {name}

The chat template, the end tokens and how to sample are in the files. Each `.proof.json` says what
was compared with the original.
"""


def _proof(one: dict[str, Any]) -> str:
    return (
        f"{one['answers_equal']} of {one['answers']} greedy answers the same, loss "
        f"{one['loss']:.4f} → {one['loss_exported']:.4f}"
    )


def write_card(folder: Path, name: str, own: Path, exported: list[dict[str, Any]]) -> None:
    """Write the card into a folder of GGUF files; `own` is the model's README.md, if it exists."""
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    proofs = [*exported, *_earlier_proofs(folder, exported)]
    write_text_atomically(folder / "README.md", gguf_card(name, text, proofs))


def _earlier_proofs(folder: Path, exported: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The proofs of the files that earlier exports left in the folder."""
    found = []
    for path in sorted(folder.glob("*.proof.json")):
        with suppress(ValueError, KeyError, TypeError):  # one that somebody damaged
            proof = json.loads(path.read_text(encoding="utf-8"))
            is_new = proof["file"] in [one["file"] for one in exported]
            if not is_new and (folder / proof["file"]).is_file():
                found.append(proof)
    return found
