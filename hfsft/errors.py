"""Errors that the user can fix, and how foreign text is shown; an error's text is the message."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# what a terminal or browser would act on instead of showing: control characters (but not tab and
# newline) and those that change the direction of writing
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# of errors that lie in the disk, or in what somebody put at a path
DISK_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
}


def printable(text: str) -> str:
    """`text` with every control character replaced by U+FFFD; tabs and newlines stay."""
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)


def quoted(text: str) -> str:
    """`text` in quotes on one line: truncated to 60 characters, control characters escaped."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'max_steps'?`, or "" if nothing is close."""
    import difflib  # 15 ms, needed for errors only

    by_plain_name = {name.lower(): name for name in known}
    plain = word.lower().replace("-", "_").replace(" ", "_")
    longer = [name for name in by_plain_name if plain and name.startswith(plain)]
    matches = longer or difflib.get_close_matches(plain, by_plain_name, n=1)
    return f"; did you mean '{by_plain_name[matches[0]]}'?" if matches else ""


@contextmanager
def panics_as(kind: type[Exception], what: str) -> Iterator[None]:
    """Raise an error of `kind` where Rust code panics, such as a tokenizer's regular expressions.

    They do so at texts that are very long without a break, and where tokenizer.json has a pattern
    that takes exponential time. pyo3's exception is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text without control characters, or its type's name."""
    return printable((str(error).splitlines() or [type(error).__name__])[0])


class HfsftError(Exception):
    """Something the user can fix; its text is the full message, printed without a traceback."""

    exit_status = 2


class RecipeError(HfsftError):
    """A recipe or command line that cannot be run as written."""


class DataError(HfsftError):
    """Data that is missing, unreadable, or leaves nothing to train on."""


class ModelError(HfsftError):
    """A model or tokenizer that is missing, unreachable or unsuitable for the stage."""


class MemoryShortage(HfsftError):
    """A stage whose plan, or a step whose smallest micro-batch, does not fit into memory."""


class DiskShortage(HfsftError):
    """A disk that is full or not writable."""


class ServingError(HfsftError):
    """A server that cannot start: its port is in use, or it would be open to anyone."""


class TrainingError(HfsftError):
    """A training run that failed, such as by losses that are NaN."""


class CheckpointError(HfsftError):
    """A checkpoint that is incomplete or corrupt, or cannot be written."""


class Interrupted(HfsftError):
    """A stage stopped by a signal; its message names the checkpoint to resume from, if any."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number
