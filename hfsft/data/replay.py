"""Replay: general conversations mixed into a stage's data, and what measures forgetting.

A part of the replayed source is held out. With as much general text it is what the stage's general
loss is computed on, before, during and after training; none of it is trained on.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import datasets

from hfsft.data.encoded import FEATURES, EncodedConversations
from hfsft.data.order import copies
from hfsft.data.rows import Row, SourceRows, check_source
from hfsft.data.sources import SOURCE_COLUMN, load_rows, parse_row
from hfsft.data.stream import is_text
from hfsft.errors import DataError
from hfsft.process_group import first_of_machine_first
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.encoding import encode_texts
from hfsft.tokens.row_formats import BadRow

CHAT, TEXT = "general chat", "general text"  # the sources of the rows of `load_general`

CHARACTERS = 8  # of text, at least, for a passage's token

LONGEST = 1024  # tokens of a passage where `max_length` is null


def general_rows(source: SourceRows, stage: Stage) -> list[int]:
    """The positions of the replayed rows that are held out, one of each distinct content.

    Args:
        source: the replayed one, checked.
        stage: says how many; at most half of the distinct rows are taken, and without validation
            none.
    """
    if not stage.validates:
        return []
    first: dict[str, int] = {}
    for row in source.kept:
        first.setdefault(source.digests[row], row)
    count = min(stage.replay.held_out, len(first) // 2)
    chosen = random.Random(f"{stage.seed}:general").sample(sorted(first), count)
    return sorted(first[digest] for digest in chosen)


def replayed(rows: list[Row], own: int, stage: Stage) -> list[Row]:
    """The replayed rows of an epoch, as copies or a sample of those there are.

    Args:
        rows: of the replayed source, without what is held out.
        own: rows that the epoch has of the stage's own data.
        stage: says which share of the epoch they are to be.
    """
    share = stage.replay.share
    wanted = round(own * share / (1 - share))
    if not wanted:
        return []
    if not rows:
        raise DataError(f"{stage.replay}: no row is left to mix in")
    return copies(rows, replace(stage.replay, repeat=1, weight=wanted / len(rows)), stage.seed)


def load_general(stage: Stage, tokenizer: Any) -> datasets.Dataset | None:
    """Encode the held-out conversations and text that a stage's general loss is computed on.

    Args:
        stage: with or without `replay`.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        `input_ids`, `labels` and `source`, which is `CHAT` or `TEXT`; None without `replay` or
        without validation.

    Raises:
        DataError: if a source cannot be read.
    """
    if stage.replay is None or not stage.validates:
        return None
    with first_of_machine_first("prepares the data it replays", stage.quiet):
        source = check_source(stage.replay, stage)
        rows = [(0, row) for row in general_rows(source, stage)]
        if not rows:
            raise DataError(f"{source.source}: has too few conversations to hold some out")
        encoded = EncodedConversations(stage, tokenizer, [source])
        encoded.encode(rows)
        chat = encoded.dataset().select_columns(["input_ids", "labels"])
        text = _general_text(stage, tokenizer)
    names = [CHAT] * len(chat) + [TEXT] * len(text)
    return datasets.concatenate_datasets([chat, text]).add_column(SOURCE_COLUMN, names)


def _general_text(stage: Stage, tokenizer: Any) -> datasets.Dataset:
    """A seeded sample of passages, each as long as a conversation may be."""
    source = Source(stage.replay.text)
    length = stage.max_length or LONGEST
    size = CHARACTERS * length
    read = load_rows(source, stage.seed)
    # counted first: memory never holds all of the text
    total = sum(1 for _ in _passages(read, source, size))
    if not total:
        raise DataError(f"{source}: has no text")
    count = min(stage.replay.held_out, total)
    chosen = set(random.Random(f"{stage.seed}:general text").sample(range(total), count))
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    passages = enumerate(_passages(read, source, size))
    ids = encode_texts([passage for index, passage in passages if index in chosen], tokenizer)
    rows = [(start + one)[:length] for one in ids]
    features = datasets.Features({name: FEATURES[name] for name in ("input_ids", "labels")})
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}, features=features)


def _passages(rows: datasets.Dataset, source: Source, size: int) -> Iterator[str]:
    """The texts of all rows, cut into passages of so many characters."""
    for row in rows:
        try:
            text = parse_row(row, source).get("text")
        except BadRow:
            continue
        if is_text(text):
            passages = (text[start : start + size] for start in range(0, len(text), size))
            yield from (passage for passage in passages if passage.strip())
