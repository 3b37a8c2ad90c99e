"""Atomic checkpoints: written to a partial folder, hashed, flushed to disk, then renamed.

A checkpoint is valid if every file in its manifest exists with the recorded size and SHA-256. If a
single bit differs, resuming falls back to the previous checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hfsft.errors import CheckpointError

MANIFEST = "manifest.json"


NAME = re.compile(r"checkpoint-(\d+)")


PLACE = "place.json"  # running sums of the next log line, and a stream's position


# a checkpoint being written, and one being deleted: names that no resume looks for
PARTIAL, DELETED = "partial", "deleted"


def commit(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    """Turn a completely written folder into a checkpoint.

    Args:
        partial: the folder, on the same disk as `final`.
        final: the checkpoint's path; a valid checkpoint there is kept, a corrupt one moved aside.
        facts: extra keys of the manifest, besides the files' sizes and hashes.

    Raises:
        OSError: if the disk is full or not writable.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = pool.map(_digest, files)
        listed = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": listed}, indent=1) + "\n")
    folders = {path.parent for path in files} | {partial}
    for path in [*files, manifest, *folders]:
        _flush(path)
    if final.exists():
        try:
            verify(final)
        except CheckpointError:
            _move_aside(final)
        else:
            return  # a valid checkpoint of this step exists already
    partial.rename(final)
    _flush(final.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    # Windows flushes only what is open for writing, and opens no folder
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_aside(folder: Path) -> None:
    count = 1
    while (aside := folder.with_name(f"{folder.name}.broken-{count}")).exists():
        count += 1
    folder.rename(aside)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a folder, valid or not, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing or unreadable.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST}") from None
    except (OSError, ValueError):
        manifest = None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys() for facts in files.values()
    ):
        raise CheckpointError(f"{checkpoint}: its {MANIFEST} cannot be read")
    return manifest


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check every file against it.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    files = manifest["files"]
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint}: {name} is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise CheckpointError(f"{checkpoint}: {name} has {size:,} of {facts['bytes']:,} bytes")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [checkpoint / name for name in files])
        for name, digest in zip(files, digests, strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(f"{checkpoint}: {name} is not what was written")
    return manifest


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies.

    Args:
        folder: the folder of the checkpoints.

    Returns:
        The checkpoint, or None if there are none at all; and what is wrong with each newer one.

    Raises:
        CheckpointError: if there are checkpoints, but none verifies.
    """
    problems = []
    for checkpoint in checkpoints(folder):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return checkpoint, problems
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"no valid checkpoint to resume from; start over with --restart\n  {listed}"
        )
    return None, []


def rotate(folder: Path, keep: int | None, needed: Collection[int] = ()) -> None:
    """Delete the oldest checkpoints, but none that hfsft did not write.

    Args:
        folder: the folder of the checkpoints.
        keep: how many of the newest to keep; None: all.
        needed: steps whose checkpoints are always kept, such as the best one's.
    """
    ours = [path for path in checkpoints(folder) if (path / MANIFEST).is_file()]
    for path in ours[keep:] if keep else []:
        if step_of(path) not in needed:
            # renamed first: if the deletion is interrupted, half a checkpoint is not left behind
            shutil.rmtree(path.rename(folder / DELETED))


def clear(folder: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for name in (PARTIAL, DELETED):
        shutil.rmtree(folder / name, ignore_errors=True)
