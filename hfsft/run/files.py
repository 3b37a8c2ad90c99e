"""Files that survive a kill or a full disk: written atomically, and read past a torn line."""

import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

LARGEST = 1 << 26  # bytes of a file of facts; a manifest of 100,000 files has 15 MB


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a kill or a full disk leaves either the old content or the new one.

    The text goes to a partial file beside it, which is flushed to disk and renamed. Parent folders
    are created.

    Args:
        path: the file to write.
        text: its content, encoded as UTF-8.

    Raises:
        OSError: if the disk is full or not writable; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a new name each time: two evaluations of one model may write the same file at the same time,
    # and "x" follows no link that somebody put there
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_small(path: Path) -> str:
    """Read a file that holds facts about a stage or model, such as a `stage.json`.

    Raises:
        OSError: if it cannot be read, is no plain file (a FIFO waits for ever, a device has no end)
            or is larger than `LARGEST`.
        UnicodeDecodeError: if it is not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a plain file", str(path))
    if (size := path.stat().st_size) > LARGEST:
        raise OSError(errno.EFBIG, f"has {size:,} bytes", str(path))
    return path.read_text(encoding="utf-8")


def remove(path: Path) -> None:
    """Remove what hfsft left behind at a path: a folder with its content, a file, or a link alone.

    Args:
        path: need not exist; the target of a link is not touched.

    Raises:
        OSError: if it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def first_free(path: Path, ending: str) -> Path:
    """The first of `NAME.ENDING-1`, `NAME.ENDING-2`, ... beside a path that does not exist."""
    count = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{ending}-{count}")):
        count += 1
    return aside


def read_json_lines(path: Path, nan_as_none: bool = False) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, skipping a line that a kill left half written.

    Lines end at `\\n` alone: `str.splitlines` would also split at a U+2028 inside a string.

    Args:
        path: the file; a missing one has no lines.
        nan_as_none: read `NaN` and `Infinity` as None instead of as floats.
    """
    if not path.is_file():
        return []
    parse_constant = (lambda name: None) if nan_as_none else None
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line.decode(), parse_constant=parse_constant)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
