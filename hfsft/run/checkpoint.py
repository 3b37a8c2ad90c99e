"""Checkpoints that are whole or not there: written beside, hashed, flushed to disk, then renamed.

A folder counts as a checkpoint if every file in its manifest is there with the size and the hash
that were written; one bit less, and the one before it is taken.
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


PLACE = "place.json"  # the sums of the next log line, and a stream's place


# names that match nothing a resume looks for: one that is being written, or deleted
PARTIAL, DELETED = "partial", "deleted"


def commit(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make a checkpoint of a folder that is written to the end.

    Args:
        partial: the folder, on the same disk as `final`.
        final: where it belongs; a checkpoint there stays if it is whole, else it is moved aside.
        facts: go into the manifest beside the files' sizes and hashes.

    Raises:
        OSError: if the disk is full or cannot be written to.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
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
            _aside(final)
        else:
            return  # what is whole stays as it is
    partial.rename(final)
    _flush(final.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(folder: Path) -> None:
    count = 1
    while (aside := folder.with_name(f"{folder.name}.broken-{count}")).exists():
        count += 1
    folder.rename(aside)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a folder, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: if it has none that can be read.
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
    """Read a checkpoint's manifest and hold every file against it.

    Raises:
        CheckpointError: naming the first file that is missing or not what was written.
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


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies.

    Args:
        folder: that holds the checkpoints.

    Returns:
        It, or None if there is no checkpoint at all; and what is wrong with the newer ones.

    Raises:
        CheckpointError: if there are checkpoints, and none verifies.
    """
    passed_over = []
    for checkpoint in checkpoints(folder):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return checkpoint, passed_over
    if passed_over:
        wrong = "\n  ".join(passed_over)
        raise CheckpointError(
            f"no checkpoint is whole; to begin the stage anew pass --restart\n  {wrong}"
        )
    return None, []


def rotate(folder: Path, keep: int | None, needed: Collection[int] = ()) -> None:
    """Delete the oldest checkpoints beyond so many; none that hfsft did not write.

    Args:
        folder: that holds the checkpoints.
        keep: how many stay; None: all.
        needed: the steps of those that stay in any case, such as the best.
    """
    ours = [path for path in checkpoints(folder) if (path / MANIFEST).is_file()]
    for path in ours[keep:] if keep else []:
        if step_of(path) not in needed:
            # broken off, it is no checkpoint any more
            shutil.rmtree(path.rename(folder / DELETED))


def clear(folder: Path) -> None:
    """Remove what a save or a deletion that was broken off has left."""
    for name in (PARTIAL, DELETED):
        shutil.rmtree(folder / name, ignore_errors=True)
