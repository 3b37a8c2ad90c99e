"""The rows of a JSON file, read in bounded memory, however long a line or the file is."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

BLOCK = 1 << 20  # bytes that are read at a time


class RowTooLong(ValueError):
    """A row of a JSON list that is longer than allowed, or has a mistake in it."""


def bounded_lines(opened: BinaryIO, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file that are not empty, each with its number from 1.

    Args:
        opened: the file, decompressed while it is read.
        longest: bytes; None stands for a longer line, which is passed over.
    """
    line, number, skipping = bytearray(), 0, False
    while block := opened.read(BLOCK):
        if not line and not skipping and block.isspace():  # newlines by the million
            number += block.count(b"\n")
            continue
        if skipping:
            end = block.find(b"\n")
            if end < 0:
                continue
            number, skipping, block = number + 1, False, block[end + 1 :]
            yield number, None
        first, *others = block.split(b"\n")
        line += first
        for other in others:
            number += 1
            if len(line) > longest:
                yield number, None
            elif line:
                yield number, bytes(line)
            line = bytearray(other)
        if len(line) > longest:
            line, skipping = bytearray(), True
    if line or skipping:
        yield number + 1, None if skipping else bytes(line)


def list_items(opened: BinaryIO, longest: int) -> Iterator[Any]:
    """The items of a JSON list, parsed one by one.

    Args:
        opened: the file, decompressed while it is read.
        longest: characters of one item.

    Raises:
        TypeError: if it is JSON, but no list.
        RowTooLong: if an item is longer, or ends nowhere.
        ValueError, RecursionError: if it is not JSON.
    """
    utf8, decoder = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, count, wanted, began = "", 0, BLOCK, False
    while True:
        block = opened.read(wanted)
        text += utf8.decode(block, final=not block)
        if not began:
            text = text.lstrip()
            if not text and block:
                continue
            if not text.startswith("["):
                json.loads(text)
                raise TypeError
            text, began = text[1:], True
        position, problem = 0, None
        while True:
            start = _skip_space(text, position)
            if text.startswith("]", start) and not count:
                return _require_end(text[start + 1 :], opened)
            try:
                item, end = decoder.raw_decode(text, start)
            except ValueError as error:
                problem = error
                break
            end = _skip_space(text, end)
            if text[end : end + 1] not in (",", "]"):  # more of it may follow, such as a digit
                problem = ValueError(f"a row is not followed by ',' or ']' (row {count})")
                break
            yield item
            count += 1
            if text[end] == "]":
                return _require_end(text[end + 1 :], opened)
            position = end + 1
        text = text[position:]
        if not block:
            raise problem
        if len(text) > longest:
            raise RowTooLong(f"row {count} is longer than {longest:,} characters, or never ends")
        wanted = max(BLOCK, len(text))  # so that a long item is tried a few times only


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\t", "\r"):
        position += 1
    return position


def _require_end(text: str, opened: BinaryIO) -> None:
    while not text.strip():
        if not (block := opened.read(BLOCK)):
            return
        text = block.decode("latin-1")
    raise ValueError("something follows the list")
