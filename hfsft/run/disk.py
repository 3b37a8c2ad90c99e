"""Room on the disk: what a stage writes, asked for before it trains, and said where it runs out."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfsft.errors import DiskShortage, HfsftError, first_line

# numbers of an error that the disk is the cause of, and what libraries say that keep none
NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


WORDS = re.compile(
    r"No space left|File too large|Read-only file system|Disk quota|Permission denied"
    # torch, of a full disk
    r"|unexpected pos|PytorchStreamWriter failed|file write failed"
)


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder, 0 where there is none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the disk of a folder, which need not exist yet.

    A quota is not seen.
    """
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def require_writable(folder: Path) -> None:
    """Return if a folder can be written to, or made.

    Raises:
        DiskShortage: if not.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise DiskShortage(f"{folder} cannot be written to: {path} is a link to nothing")
    there = _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise DiskShortage(f"{folder} cannot be written to: {there} is read-only or no folder")


def require_room(name: str, folder: Path, needed: int, contents: str) -> None:
    """Return if a disk has room for what a stage will write.

    Args:
        name: the stage's.
        folder: where it writes.
        needed: bytes in all; what the folder holds already is part of them.
        contents: what takes them, for the error.

    Raises:
        DiskShortage: with the bytes needed and free.
    """
    more, free = needed - folder_size(folder), free_bytes(folder)
    if more > free:
        raise DiskShortage(
            f"{name}: {folder} needs {shown(more)} more on its disk, and {shown(free)} are free\n"
            f"  {contents}; a smaller save_total_limit needs less, --ignore_plan starts all the "
            "same"
        )


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say in two lines where the disk ran out or cannot be written to.

    Args:
        folder: that is written to meanwhile.

    Raises:
        DiskShortage: for an error whose cause is the disk; any other passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, HfsftError) or not is_of_disk(error):
            raise
        raise DiskShortage(
            f"{getattr(error, 'filename', None) or folder}: cannot be written: "
            f"{first_line(error)}\n  {shown(free_bytes(folder))} are free on the disk of {folder}; "
            "once there is room, the same command goes on"
        ) from None


def is_of_disk(error: BaseException) -> bool:
    """Whether it is the disk that an error comes from."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NUMBERS
    # what is raised while a file is closed hides why it is
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return bool(WORDS.search(str(error))) or (before is not None and is_of_disk(before))


def shown(size: int) -> str:
    """A number of bytes, in MB as well where it is that large."""
    return f"{size:,} bytes" + (f" ({size / 1e6:,.0f} MB)" if size >= 1e6 else "")
