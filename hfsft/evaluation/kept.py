"""What an evaluation leaves on disk: each answer, and the figures."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hfsft import __version__
from hfsft.errors import HfsftError

# what answers depend on, of all that a model's folder may hold
FINGERPRINTED = (
    "*.safetensors",
    *("config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt", "*.jinja"),
)


# --- what is kept ---


def fingerprint(folder: Path, out: Path | None = None) -> str:
    """A digest of what a model's answers depend on: weights, configuration, tokenizer, template.

    Args:
        folder: of the model.
        out: keeps the digest of each weight file while its size and time of change stay the same.
    """
    cache = out / "eval" / "weights.json" if out else None
    try:
        known = json.loads(cache.read_text()) if cache else {}
    except (OSError, ValueError):
        known = {}
    digests = {}
    for path in sorted({path for name in FINGERPRINTED for path in folder.glob(name)}):
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
        before = known.get(path.name)
        if path.suffix == ".safetensors" and before and before[0] == stamp:
            digests[path.name] = before
        else:
            with path.open("rb") as file:
                digests[path.name] = [stamp, hashlib.file_digest(file, "sha256").hexdigest()]
    weights = {name: held for name, held in digests.items() if name.endswith(".safetensors")}
    if cache and weights != known:
        write_whole(cache, json.dumps(weights))
    named = sorted((name, digest) for name, (_, digest) in digests.items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def results_folder(model: str) -> Path:
    """Where a model's results go by default: its own folder, of a Hub id ./eval-OWNER--NAME."""
    folder = Path(model)
    return folder if folder.is_dir() else Path("eval-" + model.replace("/", "--"))


def open_results(model: str, out: Path, digest: str, seed: int) -> dict[str, Any]:
    """What eval.json holds, or the beginning of it where it is of other weights or another seed."""
    try:
        held = json.loads((out / "eval.json").read_text())
    except (OSError, ValueError):
        held = {}
    same = held.get("fingerprint") == digest and held.get("seed") == seed
    names = ("torch", "transformers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "model": model,
        "fingerprint": digest,
        "seed": seed,
        "versions": {"hfsft": __version__} | {name: version(name) for name in names},
        "device": device,
        "seconds": held["seconds"] if same else 0.0,
        "tasks": held["tasks"] if same else {},
        "mean_centred": None,
    }


def write_results(results: dict[str, Any], out: Path) -> None:
    """Write eval.json, with the mean centred accuracy over its tasks."""
    centred = [task["centred"] for task in results["tasks"].values() if "centred" in task]
    results["mean_centred"] = sum(centred) / len(centred) if centred else None
    write_whole(out / "eval.json", json.dumps(results, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise HfsftError(
            f"cannot write {path}: {error.strerror}; --out names another folder"
        ) from None


def row_results(out: Path, task: str) -> dict[str, dict[str, Any]]:
    """The latest result of each row of a task, of the weights that eval.json is of.

    Args:
        out: the folder of eval.json and eval/.
        task: its name.

    Returns:
        A row's digest → `right` and `answer`, or `loss`, `tokens`, `text_loss` and `bytes`.
    """
    held = json.loads((out / "eval.json").read_text())
    mine = held["fingerprint"][:16]
    lines = whole_lines(rows_file(out, task))
    return {line["row"]: line for line in lines if line["model"] == mine}


def rows_file(out: Path, task: str) -> Path:
    """The file that keeps a task's rows."""
    return out / "eval" / (re.sub(r"[^\w.-]+", "-", task) + ".jsonl")


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; one that a killed command left half written is passed over."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a file, on the disk when it returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # behind what a killed command left half written
            torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            text = "".join(json.dumps(line) + "\n" for line in lines)
            file.write(b"\n" * bool(torn) + text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise HfsftError(
            f"cannot write {path}: {error.strerror}; --out names another folder"
        ) from None
