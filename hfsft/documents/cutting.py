"""Documents cut into passages of a bounded length, at the ends of sections and sentences."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hfsft.documents.reading import Document

# where a passage may end, best first: before a heading, after a paragraph, line, sentence or word
BREAKS = (r"\n(?=#{1,6} )", r"\n\s*\n", r"\n", r"[.!?][\"')\]]*\s|[\u3002\uff01\uff1f]", r"\s")


@dataclass(frozen=True)
class Passage:
    """A part of a document: `text` is `document.text[start:end]`."""

    document: Document
    start: int
    end: int

    @property
    def text(self) -> str:
        """Its text."""
        return self.document.text[self.start : self.end]

    def source(self) -> dict[str, str | int]:
        """Where it stands: the file, the range of characters, and the page of a PDF."""
        place: dict[str, str | int] = {"file": self.document.name}
        place |= {"start": self.start, "end": self.end}
        page = self.document.page(self.start)
        return place if page is None else place | {"page": page}


def passages(document: Document, most: int) -> Iterator[Passage]:
    """Cut a document into passages; only white space between them is left out.

    Args:
        document: the one to cut.
        most: characters of a passage at most.
    """
    text, start = document.text, 0
    while start < len(text):
        end = min(start + most, len(text))
        if end < len(text):
            end = start + _best_break(text[start:end])
        stripped = text[start:end].strip()
        if stripped:
            first = start + text[start:end].index(stripped)
            yield Passage(document, first, first + len(stripped))
        start = end


def _best_break(window: str) -> int:
    """Where to end a passage within a window: at the last best break of its second half."""
    for pattern in BREAKS:
        ends = [match.end() for match in re.finditer(pattern, window)]
        if ends and ends[-1] >= len(window) // 2:
            return ends[-1]
    return len(window)
