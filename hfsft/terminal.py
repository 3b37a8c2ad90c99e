"""The terminal: whatever is printed there is stripped of control characters here, in one place.

A row, an answer of a server, a file's name or a model's text could otherwise set the window's
title, clear the screen or hide a line.
"""

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from hfsft.errors import CONTROL_CHARACTERS, printable


class Terminal(Console):
    """rich's console, which lets through only the control codes that rich makes of styles."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """The text of segments, all that is printed in any way."""
        return super()._render_buffer(
            segment if segment.control else Segment(printable(segment.text), segment.style)
            for segment in buffer
        )


def say(text: Any) -> None:
    """Print a text as a line."""
    print(printable(str(text)), flush=True)


def say_json(data: Any, **settings: Any) -> None:
    """Print data as JSON, control characters escaped.

    Args:
        data: of builtin types.
        settings: of `json.dumps`.
    """
    text = json.dumps(data, ensure_ascii=False, **settings)
    # JSON itself escapes those below 0x20, so what is found here is part of a string
    print(CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)
