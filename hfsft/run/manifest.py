"""Manifests: the size and SHA-256 of every file of a checkpoint or a finished model.

A checkpoint is written to a partial folder, sealed with its manifest, then renamed. It is valid if
every file in its manifest exists as recorded: if a single bit differs, resuming falls back to the
previous checkpoint. A finished model is sealed the same way, and `verify_model` checks it before
anything uses it.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hfsft.errors import CheckpointError
from hfsft.run.files import first_free, read_small, remove

MANIFEST = "manifest.json"


NAME = re.compile(r"checkpoint-(\d+)")


PLACE = "place.json"  # running sums of the next log line, and a stream's position


# a checkpoint being written, and one being deleted: names that no resume looks for
PARTIAL, DELETED = "partial", "deleted"


# what `verify_model` has found intact: folder → size and time of every file
_intact: dict[Path, list[tuple[str, int, int]]] = {}


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a completely written folder, and flush all of it to disk.

    Args:
        folder: every file in it is listed.
        facts: extra keys of the manifest, besides the files' sizes and hashes.

    Raises:
        OSError: if the disk is full or not writable.
    """
    manifest = folder / MANIFEST
    manifest.unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = pool.map(_digest, files)
        listed = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    manifest.write_text(json.dumps({**facts, "files": listed}, indent=1) + "\n")
    folders = {path.parent for path in files} | {folder}
    for path in [*files, manifest, *folders]:
        _flush(path)


def commit(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    """Turn a completely written folder into a checkpoint.

    Args:
        partial: the folder, on the same disk as `final`.
        final: the checkpoint's path; a valid checkpoint there is kept, a corrupt one moved aside.
        facts: as `seal` takes them.

    Raises:
        OSError: if the disk is full or not writable.
    """
    seal(partial, facts)
    if os.path.lexists(final):
        try:
            verify(final)
        except CheckpointError:
            final.rename(first_free(final, "broken"))
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
        manifest = json.loads(read_small(checkpoint / MANIFEST))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError):
        manifest = None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if (
        not isinstance(files, dict)
        or not files
        or not all(
            isinstance(facts, dict)
            and isinstance(facts.get("bytes"), int)
            and isinstance(facts.get("sha256"), str)
            for facts in files.values()
        )
    ):
        raise CheckpointError(f"{checkpoint}: its {MANIFEST} cannot be read")
    return manifest


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check every file against it.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest["files"])
    return manifest


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check files against the sizes and hashes of a manifest.

    Args:
        folder: holds them.
        files: of its manifest, or some of them.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise CheckpointError(f"{folder}: {name} has {size:,} of {facts['bytes']:,} bytes")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [folder / name for name in files])
        for name, digest in zip(files, digests, strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(f"{folder}: {name} is not what was written")


def verify_model(folder: Path) -> None:
    """Check a finished stage or a checkpoint against its manifest before it is used.

    A folder without a manifest of hfsft's, such as another tool's model, is not checked. Neither is
    one again in this process whose files have kept their sizes and times.

    Args:
        folder: a model's.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    key = folder.resolve()
    if not os.path.lexists(key / MANIFEST):
        return
    if not NAME.fullmatch(key.name) and not os.path.lexists(key / "stage.json"):
        return  # a manifest of another tool
    listed = sorted(read_manifest(folder)["files"])
    stats = [os.stat(key / name) for name in listed if (key / name).is_file()]
    seen = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(listed, stats, strict=False)]
    if len(seen) == len(listed) and _intact.get(key) == seen:
        return
    try:
        verify(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n  Train it again, or copy it again from where it came. If the change was "
            f"meant, delete {folder / MANIFEST}"
        ) from None
    _intact[key] = seen


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
            remove(folder / DELETED)
            remove(path.rename(folder / DELETED))


def clear(folder: Path) -> None:
    """Remove what an interrupted save or deletion left behind.

    Raises:
        OSError: if it cannot be removed.
    """
    for name in (PARTIAL, DELETED):
        remove(folder / name)
