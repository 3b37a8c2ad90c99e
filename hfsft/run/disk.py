"""Disk space: checked before a stage trains, and reported clearly where it runs out."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfsft.errors import DISK_ERRNOS, DiskShortage, HfsftError, first_line

# messages of libraries that raise errors without an errno
DISK_MESSAGES = re.compile(
    r"No space left|File too large|Read-only file system|Disk quota|Permission denied"
    # torch.save and safetensors on a full disk
    r"|unexpected pos|PytorchStreamWriter failed|file write failed"
    # numpy's tofile
    r"|\d+ requested and \d+ written"
)


def folder_size(folder: Path) -> int:
    """Total bytes of the files in a folder, 0 if it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the disk of a folder, which need not exist yet.

    Quotas are not taken into account.
    """
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def require_writable(folder: Path) -> None:
    """Check that a folder is writable, or can be created.

    Raises:
        DiskShortage: if not.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise DiskShortage(f"{folder} cannot be written to: {path} is a dangling symlink")
    there = _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise DiskShortage(f"{folder} cannot be written to: {there} is read-only or not a folder")


def require_room(name: str, folder: Path, needed: int, contents: str) -> None:
    """Check that the disk has room for what a stage will write.

    Args:
        name: the stage's.
        folder: the folder that the stage writes to.
        needed: bytes in total, including what the folder already holds.
        contents: what takes the space, for the error message.

    Raises:
        DiskShortage: with the bytes needed and free.
    """
    missing, free = needed - folder_size(folder), free_bytes(folder)
    if missing > free:
        raise DiskShortage(
            f"{name}: {folder} needs {shown(missing)} more on its disk, and {shown(free)} are free"
            f"\n  {contents}; lower save_total_limit, or pass --ignore_plan to start anyway"
        )


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Report a full or read-only disk in two lines.

    Args:
        folder: the folder being written to.

    Raises:
        DiskShortage: instead of any error caused by the disk; other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, HfsftError) or not is_of_disk(error):
            raise
        raise DiskShortage(
            f"{getattr(error, 'filename', None) or folder}: cannot be written: "
            f"{first_line(error)}\n  {shown(free_bytes(folder))} are free on the disk of {folder}; "
            "once there is room, run the same command to resume"
        ) from None


def is_of_disk(error: BaseException) -> bool:
    """Whether an error was caused by a full or read-only disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_ERRNOS
    # an error raised while a file is closed hides the one that came first
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return bool(DISK_MESSAGES.search(str(error))) or (earlier is not None and is_of_disk(earlier))


def shown(size: int) -> str:
    """A number of bytes as text, also in MB from a megabyte on."""
    return f"{size:,} bytes" + (f" ({size / 1e6:,.0f} MB)" if size >= 1e6 else "")
