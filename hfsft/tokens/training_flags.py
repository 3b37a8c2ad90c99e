"""What a row says about training: weights, flags and character ranges, and answers to avoid.

Every other trainer spells them differently: OpenAI's fine-tuning `weight`, axolotl's `train`,
`training` and `train_detail`, LLaMA-Factory's `loss_weight` and `kto_tag`, trl's `label`. What says
no is always honoured; what looks like one of them and is not understood refuses the row.
"""

import json
import re
from collections.abc import Mapping
from typing import Any


class BadRow(Exception):
    """A row that cannot be trained on; its message is the reason that the audit shows."""


# reasons of rows that are well-formed, and left out because they say so
AVOIDED, NOT_TRAINED = "an answer to avoid", "marked as not to train on"

Span = tuple[int, int]  # characters of a content, the end exclusive

SPELLINGS = {  # a field → the value that says: do not train on this
    "weight": False,
    "loss_weight": False,
    "train": False,
    "training": False,
    "loss": False,
    "mask": True,
    "masked": True,
}
RANGES = ("train_detail", "training_detail")
KTO = ("label", "kto_tag")
# of a whole row only as true or false: a number may be a measurement, such as a sample's loss
MAY_BE_MEASURED = ("loss", "mask", "masked")

# a field with one of these words looks like a flag
FLAG_WORDS = {
    *("weight", "weights", "loss", "mask", "masks", "masked"),
    *("train", "trained", "training", "trainable", "untrained"),
}
ROW_LOOKS_LIKE_ONE = re.compile(
    r"(loss|train|training|token)s?[_-]?(mask|weight|detail|label)s?", re.IGNORECASE
)

WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def is_blank(value: Any) -> bool:
    """Whether a field has no value: what a row lacks, Arrow gives as None and a CSV as NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (isinstance(value, list | dict) and not value)


def as_flag(value: Any) -> bool | None:
    """A value that is true or false, also as 0, 1 or text (a CSV's); None if it is neither."""
    if isinstance(value, str):
        return WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def is_trained(fields: Mapping[str, Any]) -> bool | None:
    """What the flags of a message, or of a part of one, say; None if it has none.

    Args:
        fields: of the message; where two disagree, no counts.

    Raises:
        BadRow: if one is not understood, such as a fractional weight.
    """
    answers = []
    for name, no in SPELLINGS.items():
        if is_blank(value := fields.get(name)):
            continue
        flag = as_flag(value)
        if flag is None and isinstance(value, int | float):
            # the loss is a mean over trained tokens, of every stage, rank and report
            raise BadRow(
                f"{name} is neither 0 nor 1, and a token is trained on or it is not; to see rows "
                "less often, give them a source with that `weight`"
            )
        if flag is None:
            raise BadRow(f"{name} is neither true nor false")
        answers.append(flag is not no)
    return all(answers) if answers else None


def trained_spans(fields: Mapping[str, Any], content: Any) -> list[Span] | None:
    """The characters of a content that axolotl's `train_detail` trains; None if it has none.

    Args:
        fields: of the message; each range has `begin_offset`, `end_offset` (inclusive) and `train`.
        content: the message's text.

    Raises:
        BadRow: if the ranges are not understood.
    """
    given = [fields[name] for name in RANGES if fields.get(name) is not None]
    if not given:
        return None
    try:
        ranges = json.loads(given[0]) if isinstance(given[0], str) else given[0]
        marks = bytearray(len(content))  # 0: not mentioned, 1: trained, 2: not to be trained
        for one in ranges:
            begin, end, flag = one["begin_offset"], one["end_offset"], as_flag(one["train"])
            # a last character one too far is an exclusive end
            if flag is None or not 0 <= begin <= end <= len(content):
                raise ValueError
            for place in range(begin, min(end + 1, len(content))):
                marks[place] = max(marks[place], 1 if flag else 2)
    except (KeyError, TypeError, ValueError):
        raise BadRow("train_detail that is not ranges of its content") from None
    return [found.span() for found in re.finditer(rb"\x01+", bytes(marks))]


def check_lookalikes(fields: Mapping[str, Any], known: set[str]) -> None:
    """Check that no field of a message looks like a flag and is not understood.

    Raises:
        BadRow: naming it.
    """
    for name, value in fields.items():
        if name in known or is_blank(value):
            continue
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()  # also lossWeight
        if FLAG_WORDS & set(re.split(r"[^a-z]+", words)):
            raise BadRow(f"a field {name}, which is not understood")


def check_row_flags(row: Mapping[str, Any], has_label: bool) -> set[str]:
    """Check whether a row as a whole may be trained on.

    Args:
        row: its columns.
        has_label: whether `label` may be KTO's; in a multiple choice it is an answer.

    Returns:
        The columns that were understood.

    Raises:
        BadRow: if it says that it is not to be trained on, or says something not understood.
    """
    understood = set()
    for name in KTO if has_label else KTO[1:]:
        value = row.get(name)
        # a `label` of 0 or 1 is a class, as in a classification set
        is_class = name == "label" and str(value).strip().lower() not in ("true", "false")
        flag = None if is_class else as_flag(value)
        if flag is False:
            raise BadRow(f"{AVOIDED} ({name}: false)")
        if flag is None and name != "label" and not is_blank(value):
            raise BadRow(f"{name} is neither true nor false")
        understood |= {name} if flag else set()
    for name in SPELLINGS:
        if is_blank(value := row.get(name)):
            continue
        if name in MAY_BE_MEASURED and not isinstance(value, bool | str):
            continue
        if not is_trained({name: value}):
            raise BadRow(f"{NOT_TRAINED} ({name})")
        understood.add(name)
    for name, value in row.items():
        looks_like_one = name not in SPELLINGS and ROW_LOOKS_LIKE_ONE.fullmatch(str(name))
        if looks_like_one and not is_blank(value):
            raise BadRow(f"a column {name}, which is not understood")
    return understood
