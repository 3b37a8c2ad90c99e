"""The documents of a folder as plain text: text, Markdown, HTML and PDF."""

import logging
import os
import re
import warnings
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hfsft.errors import DataError, first_line, printable

PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")
HTML = (".html", ".htm", ".xhtml")
KINDS = (*PLAIN, *HTML, ".pdf")

MADE = ".make-data"  # of a folder beside the rows, which holds the teacher's answers

LARGEST = 2**26  # bytes of a file: 64 MiB

# parts of a page that are not its text
PAGE_PARTS = ("script", "style", "noscript", "template", "iframe", "svg", "nav", "footer", "aside")
PAGE_PARTS += ("form", "button", "select")

REPEATED = 0.5  # a line that starts or ends this share of a PDF's pages is a running head


@dataclass(frozen=True)
class Document:
    """One file's text.

    Args:
        name: the file's path within the folder.
        text: its text; the character ranges of rows count in it.
        pages: of a PDF, where in the text each page starts.
    """

    name: str
    text: str
    pages: tuple[int, ...] = ()

    def page(self, position: int) -> int | None:
        """The PDF page, from 1, of a position in the text; None where there are no pages."""
        return bisect_right(self.pages, position) if self.pages else None


class Unreadable(Exception):
    """A file without usable text; its message is the reason."""


def read_folder(folder: Path) -> tuple[list[Document], list[dict[str, str]]]:
    """Read every document of a folder and its subfolders, hidden ones left out.

    Args:
        folder: the folder, or a single file.

    Returns:
        The documents in the order of their names, and the `file` and `reason` of each other file.

    Raises:
        DataError: if there is no such folder, or no document in it.
    """
    if folder.is_file():
        files, top = [folder], folder.parent
    elif folder.is_dir():
        files, top = sorted(_visible_files(folder)), folder
    else:
        raise DataError(f"{folder}: no such folder")
    documents, unread = [], []
    first_with: dict[str, str] = {}  # text → the document that has it
    for path in files:
        name = printable(os.fsencode(path.relative_to(top)).decode("utf-8", "replace"))
        try:
            document = read_document(path, name)
            if document.text in first_with:
                raise Unreadable(f"the same text as {first_with[document.text]}")
        except Unreadable as problem:
            unread.append({"file": name, "reason": str(problem)})
            continue
        first_with[document.text] = name
        documents.append(document)
    if not documents:
        first = f": {unread[0]['file']}: {unread[0]['reason']}" if unread else ""
        raise DataError(f"{folder} holds no document of {', '.join(KINDS)}{first}")
    return documents, unread


def _visible_files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
        # the second: of earlier rows, if they are in the folder
        folders[:] = [one for one in folders if one[0] != "." and not one.endswith(MADE)]
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return found


def read_document(path: Path, name: str) -> Document:
    """Read one file.

    Args:
        path: the file.
        name: what to call it.

    Raises:
        Unreadable: with the reason.
    """
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise Unreadable(f"a kind of file that is not read ({printable(suffix) or 'no suffix'})")
    try:
        if not path.is_file():
            raise Unreadable("not a file")
        if path.stat().st_size > LARGEST:
            raise Unreadable(f"larger than {LARGEST >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None
    if suffix == ".pdf":
        pages = [_cleaned(page) for page in _pdf_pages(data)]
        text, starts = _joined(_without_running_heads(pages))
    else:
        text, starts = _cleaned(_page_text(data) if suffix in HTML else _decoded(data)), ()
    if not text.strip():
        raise Unreadable(
            "no text: a scanned PDF needs OCR first" if suffix == ".pdf" else "no text"
        )
    return Document(name, text, starts)


def _cleaned(text: str) -> str:
    """The text with Unix line ends, without control characters or half surrogate pairs."""
    text = text.encode("utf-8", "replace").decode().replace("\r\n", "\n").replace("\r", "\n")
    return printable(text.replace("\f", "\n"))


def _decoded(data: bytes) -> str:
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text (byte {error.start})") from None


# --- HTML ---


def _page_text(data: bytes) -> str:
    """The text of a page as Markdown, without its navigation and scripts."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    converter = MarkdownConverter(
        heading_style="atx",
        bullets="-",
        strip=["a", "img"],  # a link is its text
        escape_asterisks=False,
        escape_underscores=False,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # XHTML, or a page without tags
            page = BeautifulSoup(data, "html.parser")
        for part in page(PAGE_PARTS):
            part.decompose()
        body = page.find("main") or page.find(role="main") or page.body or page
        text = converter.convert_soup(body)
    except RecursionError:
        raise Unreadable("its tags are nested too deeply") from None
    lines = [line.rstrip() for line in text.replace("\xa0", " ").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


# --- PDF ---


def _pdf_pages(data: bytes) -> list[str]:
    """The text of each page."""
    import io

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of each malformed object
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("a PDF with a password")
        return [page.extract_text() for page in reader.pages]
    except Unreadable:
        raise
    except pypdf.errors.DependencyError:
        raise Unreadable("an encrypted PDF, which needs: pip install cryptography") from None
    except Exception as error:  # of a malformed file: KeyError, RecursionError, …
        raise Unreadable(f"not a readable PDF: {first_line(error)}") from None


def _without_running_heads(pages: list[str]) -> list[str]:
    """The pages without lines that start or end many of them, apart from a page number."""
    split = [page.strip().split("\n") for page in pages]
    heads = Counter(_numberless(lines[0]) for lines in split)
    feet = Counter(_numberless(lines[-1]) for lines in split)
    least = max(3, REPEATED * len(pages))
    kept = []
    for lines in split:
        start = heads[_numberless(lines[0])] >= least
        end = len(lines) - (feet[_numberless(lines[-1])] >= least)
        kept.append("\n".join(lines[start:end]))
    return kept


def _numberless(line: str) -> str:
    return re.sub(r"\d+", "0", line.strip())


def _joined(pages: list[str]) -> tuple[str, tuple[int, ...]]:
    """The text of all pages, and where each starts."""
    text, starts = "", []
    for page in pages:
        starts.append(len(text))
        text += _unwrapped(page) + "\n\n"
    return text, tuple(starts)


def _unwrapped(page: str) -> str:
    """A page's text with the lines joined that continue a sentence or a hyphenated word."""
    lines: list[str] = []
    for line in page.strip().split("\n"):
        line, before = line.strip(), lines[-1] if lines else ""
        if not before or not line[:1].islower() or before[-1] in ".!?:;":
            lines.append(line)
        elif before[-1] in "-\u00ad" and before[-2:-1].isalpha():
            lines[-1] = before[:-1] + line
        else:
            lines[-1] = f"{before} {line}"
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
