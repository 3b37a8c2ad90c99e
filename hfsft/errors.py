"""What a user can mend, and how it is said: one or two lines on standard error, exit status 2."""

import sys
from collections.abc import Callable


class HfsftError(Exception):
    """Something the user can mend; its text is the whole message, no traceback follows."""

    exit_status = 2


class RecipeError(HfsftError):
    """A recipe or a command line that cannot be run as it is written."""


class DataError(HfsftError):
    """Data that is missing, unreadable, or leaves nothing to train on."""


class ModelError(HfsftError):
    """A model or tokenizer that is missing, out of reach or does not suit the stage."""


class MemoryShortage(HfsftError):
    """A step that does not fit into memory, however it is cut."""


class TrainingError(HfsftError):
    """A training that came to nothing, as by numbers that are no numbers."""


class CheckpointError(HfsftError):
    """A checkpoint that is not whole, or cannot be written."""


class Interrupted(HfsftError):
    """A stage stopped by a signal, with a checkpoint on disk to go on from."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def run_main(main: Callable[..., None], *argv: str) -> None:
    """Run `main(*argv)` as a process does: exit with the status and the words of its error.

    Args:
        main: a stage's or a command's entry point.
        argv: the command line without the program's name.

    Raises:
        SystemExit: with the `exit_status` of an `HfsftError`, or 130 after an interrupt.
    """
    try:
        main(*argv)
    except HfsftError as error:
        print(f"hfsft: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("hfsft: interrupted", file=sys.stderr)
        sys.exit(130)
