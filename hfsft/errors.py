"""What a user can mend; the text of an error is the whole message."""

from collections.abc import Iterable


def quoted(text: str) -> str:
    """`text` in quotes on one line: cut at 60 characters, control characters escaped."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'max_steps'?`, or nothing if none is near."""
    import difflib  # 15 ms, needed on errors only

    by_plain_name = {name.lower(): name for name in known}
    plain = word.lower().replace("-", "_").replace(" ", "_")
    longer = [name for name in by_plain_name if plain and name.startswith(plain)]
    matches = longer or difflib.get_close_matches(plain, by_plain_name, n=1)
    return f"; did you mean '{by_plain_name[matches[0]]}'?" if matches else ""


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


class DiskShortage(HfsftError):
    """A disk that is full, or cannot be written to."""


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
