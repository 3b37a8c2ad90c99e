"""Markdown that foreign text cannot break out of, and its rendering as one HTML file."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from hfsft.errors import printable
from hfsft.run.files import write_text_atomically

# characters with a meaning inside a line of Markdown; an underscore only at the edge of a word
SYNTAX = re.compile(r"[\\`*\[\]<>|~&$#]|(?<!\w)_|_(?!\w)")


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .875rem }
th, td { border: 1px solid #8888; padding: .25rem .5rem; vertical-align: top }
pre { background: #8882; padding: .75rem; overflow-x: auto; white-space: pre-wrap }
img { max-width: 100%; background: #fff }
@media print { body { margin: 0; max-width: none } img, tr, pre { break-inside: avoid } }
"""


def plain(text: object) -> str:
    """Foreign text as one line of Markdown that shows it literally, also inside a table."""
    return SYNTAX.sub(r"\\\g<0>", " ".join(printable(str(text)).split()))


def code(text: str) -> str:
    """Inline code; not for tables, where a `|` would end the cell."""
    ticks = "`" * (1 + _longest_ticks(text))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{' '.join(printable(text).split())}{space}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """A fenced block that none of its lines can close."""
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table.

    Args:
        header: the columns' titles.
        rows: cells in Markdown; foreign text must go through `plain` first.
        left: how many columns are left-aligned text; the others are right-aligned numbers.
    """
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def write_page(path: Path, text: str, as_html: bool) -> Path:
    """Write a page of Markdown, and with `as_html` an HTML file beside it.

    Args:
        path: of the Markdown; its pictures' paths are relative to it.
        text: Markdown whose first line is the title.
        as_html: whether to write HTML as well.

    Returns:
        The file to open.
    """
    write_text_atomically(path, text)
    if not as_html:
        return path
    page = path.with_suffix(".html")
    title = text.partition("\n")[0].removeprefix("# ").replace("\\", "")
    write_text_atomically(page, html_page(title, text, path.parent))
    return page


def html_page(title: str, markdown: str, folder: Path) -> str:
    """Render Markdown as one self-contained HTML file with embedded pictures.

    Args:
        title: plain text.
        markdown: HTML in it is shown as text.
        folder: the one that its pictures' paths are relative to.
    """
    parser = MarkdownIt("js-default")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                picture = base64.b64encode((folder / str(child.attrs["src"])).read_bytes())
                child.attrs["src"] = f"data:image/png;base64,{picture.decode()}"
    body = parser.renderer.render(tokens, parser.options, {})
    # defence in depth: even if markup slips through, no script runs and nothing is fetched
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
