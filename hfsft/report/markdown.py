"""Markdown that text from data cannot break out of, and one HTML file made of it."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

# what the terminal or the browser would act on instead of showing: control characters, and those
# that turn the direction of writing
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# what means something within a line of Markdown; an underscore only at the edge of a word
MEANT = re.compile(r"[\\`*\[\]<>|~&$#]|(?<!\w)_|_(?!\w)")


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .875rem }
th, td { border: 1px solid #8888; padding: .25rem .5rem; vertical-align: top }
pre { background: #8882; padding: .75rem; overflow-x: auto; white-space: pre-wrap }
img { max-width: 100%; background: #fff }
@media print { body { margin: 0; max-width: none } img, tr, pre { break-inside: avoid } }
"""


def printable(text: str) -> str:
    """The text with a mark in the place of every character that would act, not show."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def plain(text: object) -> str:
    """Any text as one line of Markdown that shows it as it is, within a table too."""
    return MEANT.sub(r"\\\g<0>", " ".join(printable(str(text)).split()))


def code(text: str) -> str:
    """A line of code within a sentence; not for tables, where a bar would end the cell."""
    ticks = "`" * (1 + _longest_ticks(text))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{' '.join(printable(text).split())}{space}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """A block of text that no line of it can end."""
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown.

    Args:
        header: of its columns.
        rows: cells of Markdown; text from elsewhere goes through `plain` first.
        left: how many columns hold words; the others hold numbers and stand right.
    """
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def write_page(path: Path, text: str, as_html: bool) -> Path:
    """Write a page of Markdown, and with `as_html` one of HTML beside it.

    Args:
        path: of the Markdown, beside which its pictures' paths start.
        text: Markdown that opens with a title.
        as_html: whether.

    Returns:
        The file to open.
    """
    path.write_text(text, encoding="utf-8")
    if not as_html:
        return path
    page = path.with_suffix(".html")
    title = text.partition("\n")[0].removeprefix("# ").replace("\\", "")
    page.write_text(html_page(title, text, path.parent), encoding="utf-8")
    return page


def html_page(title: str, markdown: str, folder: Path) -> str:
    """The Markdown as one HTML file that needs no other: its pictures are inside.

    Args:
        title: plain text.
        markdown: HTML in it is shown, not obeyed.
        folder: that its pictures' paths start from.
    """
    parser = MarkdownIt("js-default")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                picture = base64.b64encode((folder / str(child.attrs["src"])).read_bytes())
                child.attrs["src"] = f"data:image/png;base64,{picture.decode()}"
    body = parser.renderer.render(tokens, parser.options, {})
    # whatever slipped through: the browser runs no script and fetches nothing
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
{body}</html>
"""
