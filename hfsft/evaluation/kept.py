"""What an evaluation leaves on disk: answers in eval/<task>.jsonl, figures in eval.json."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hfsft import __version__
from hfsft.errors import HfsftError
from hfsft.run.files import read_json_lines, read_small, write_text_atomically
from hfsft.run.identity import FINGERPRINTED

# --- whose answers ---


def fingerprint(folder: Path, out: Path | None = None) -> str:
    """A digest of what a model's answers depend on: weights, configuration, tokenizer, template.

    Args:
        folder: the model's.
        out: caches the digest of each weight file in eval/weights.json while the file's size,
            modification time and inode stay the same.
    """
    cache = out / "eval" / "weights.json" if out else None
    try:
        known = json.loads(cache.read_text()) if cache else {}
    except (OSError, ValueError):
        known = {}
    digests = {}
    for path in sorted({path for name in FINGERPRINTED for path in folder.glob(name)}):
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        cached = known.get(path.name)
        if path.suffix == ".safetensors" and cached and cached[0] == stamp:
            digests[path.name] = cached
        else:
            with path.open("rb") as file:
                digests[path.name] = [stamp, hashlib.file_digest(file, "sha256").hexdigest()]
    weights = {name: entry for name, entry in digests.items() if name.endswith(".safetensors")}
    if cache and weights != known:
        with _writing(cache):
            write_text_atomically(cache, json.dumps(weights))
    named = sorted((name, digest) for name, (_, digest) in digests.items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


# --- eval.json ---


def results_folder(model: str) -> Path:
    """The default folder of a model's results: its own, or ./eval-OWNER--NAME for a Hub id."""
    folder = Path(model)
    return folder if folder.is_dir() else Path("eval-" + model.replace("/", "--"))


def open_results(model: str, out: Path, digest: str, seed: int) -> dict[str, Any]:
    """The results to add to: those of eval.json, or empty ones for other weights or another seed.

    Args:
        model: as the user named it.
        out: the folder of eval.json.
        digest: the model's `fingerprint`.
        seed: of the choice of rows.
    """
    try:
        earlier = json.loads(read_small(out / "eval.json"))
    except (OSError, ValueError, RecursionError):
        earlier = {}
    same = earlier.get("fingerprint") == digest and earlier.get("seed") == seed
    names = ("torch", "transformers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "model": model,
        "fingerprint": digest,
        "seed": seed,
        "versions": {"hfsft": __version__} | {name: version(name) for name in names},
        "device": device,
        "seconds": earlier["seconds"] if same else 0.0,
        "tasks": earlier["tasks"] if same else {},
        "mean_centred": None,
        "chatcore": None,
    }


def write_results(results: dict[str, Any], out: Path) -> None:
    """Write eval.json, with the mean of the tasks' centred accuracies."""
    centred = [task["centred"] for task in results["tasks"].values() if "centred" in task]
    results["mean_centred"] = sum(centred) / len(centred) if centred else None
    path = out / "eval.json"
    with _writing(path):
        write_text_atomically(path, json.dumps(results, indent=1) + "\n")


# --- answers, row by row ---


def rows_file(out: Path, task: str) -> Path:
    """The file that keeps the results of a task's rows."""
    return out / "eval" / (re.sub(r"[^\w.-]+", "-", task) + ".jsonl")


def row_results(out: Path, task: str) -> dict[str, dict[str, Any]]:
    """The latest result of each row of a task, for the weights and settings of eval.json.

    Args:
        out: the folder of eval.json and eval/.
        task: its name.

    Returns:
        A row's digest → `right` and `answer`, or `loss`, `tokens`, `text_loss` and `bytes`.
    """
    results = json.loads((out / "eval.json").read_text())
    label = {"model": results["fingerprint"][:16]}
    if "way" in results["tasks"][task]:  # earlier versions did not write it
        label["way"] = results["tasks"][task]["way"]
    lines = read_json_lines(rows_file(out, task))
    return {line["row"]: line for line in lines if label.items() <= line.items()}


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a JSONL file and flush them to disk.

    Raises:
        HfsftError: if the file cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # end the line that a killed command left half written
            is_torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            text = "".join(json.dumps(line) + "\n" for line in lines)
            file.write(b"\n" * bool(is_torn) + text.encode())
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HfsftError(
            f"cannot write {path}: {error.strerror}; choose another folder with --out"
        ) from None
