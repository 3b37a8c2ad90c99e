"""Text, Markdown, HTML and PDF to plain text; what cannot be read is named with its reason."""

import os
from pathlib import Path

import pytest

from hfsft.documents import reading
from hfsft.documents.reading import read_document, read_folder
from hfsft.errors import DataError


def pdf(*pages: list[str]) -> bytes:
    """A PDF with the lines of each page, in Helvetica."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    numbers = [4 + 2 * index for index in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in numbers)
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, lines in zip(numbers, pages, strict=True):
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {number + 1} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode()
    rows = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{rows}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    return data + f"{end}startxref\n{len(data)}\n%%EOF\n".encode()


def text_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return read_document(path, path.name).text


def test_plain_text_is_kept_but_for_marks_and_control_characters(tmp_path):
    given = "\ufeffA\r\nB\tc\x1b[0m\x0cd\r"
    assert text_of(tmp_path / "a.txt", given.encode()) == "A\nB\tc\ufffd[0m\nd\n"
    assert text_of(tmp_path / "a.md", "# Ä\n".encode("utf-16")) == "# Ä\n"


def test_html_becomes_markdown_without_its_navigation(tmp_path):
    page = """<!doctype html><html><head><title>T</title><style>p {}</style></head><body>
    <nav>Home | About</nav><main><h1>Ferns</h1><p>They <b>love</b> <a href="/x">shade</a>.</p>
    <ul><li>one_a</li><li>two*</li></ul><script>run()</script>
    <pre><code>a = 1\nb</code></pre></main><footer>(c)</footer></body></html>"""
    assert text_of(tmp_path / "a.html", page.encode()) == (
        "# Ferns\n\nThey **love** shade.\n\n- one_a\n- two*\n\n```\na = 1\nb\n```\n"
    )
    latin = '<meta charset="iso-8859-1"><p>caf\xe9</p>'.encode("latin-1")
    assert text_of(tmp_path / "b.htm", latin) == "café\n"


def test_pdf_lines_are_joined_and_running_heads_left_out(tmp_path):
    pages = [
        ["The Fern Book", f"Chapter {n}.", "Ferns love", "sha-", "de and rain.", f"Page {n}"]
        for n in (1, 2, 3)
    ]
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(*pages))
    document = read_document(path, "a.pdf")
    page = "Chapter {}.\nFerns love shade and rain.\n\n"
    assert document.text == "".join(page.format(n) for n in (1, 2, 3))
    assert [document.page(document.text.index(f"Chapter {n}")) for n in (1, 2, 3)] == [1, 2, 3]


def test_what_cannot_be_read_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 2000)
    files = {
        "a.txt": b"kept",
        "b.txt": b"kept",
        "bad.txt": b"ok \xff",
        "blank.md": b" \n",
        "deep.html": b"<div>" * 5000,
        "empty.pdf": pdf([]),
        "large.txt": b"x" * 2001,
        "notes.docx": b"PK",
        "torn.pdf": pdf(["text"])[:90],
        ".hidden.txt": b"hidden",
        "rows.make-data/x.txt": b"ours",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data[:2000] if name == "deep.html" else data)
    os.symlink("nowhere", tmp_path / "link.txt")
    documents, unread = read_folder(tmp_path)
    reasons = {one["file"]: one["reason"] for one in unread}
    assert [document.name for document in documents] == ["a.txt"]
    assert reasons.pop("torn.pdf").startswith("not a readable PDF: ")
    assert reasons.pop("deep.html") in ("no text", "its tags are nested too deeply")
    assert reasons == {
        "b.txt": "the same text as a.txt",
        "bad.txt": "not UTF-8 text (byte 3)",
        "blank.md": "no text",
        "empty.pdf": "no text: a scanned PDF needs OCR first",
        "large.txt": "larger than 0 MiB",
        "link.txt": "not a file",
        "notes.docx": "a kind of file that is not read (.docx)",
    }


def test_an_encrypted_pdf_is_named(tmp_path):
    from pypdf import PdfReader, PdfWriter

    (tmp_path / "open.pdf").write_bytes(pdf(["secret"]))
    writer = PdfWriter(clone_from=PdfReader(tmp_path / "open.pdf"))
    writer.encrypt("word", algorithm="RC4-128")
    (tmp_path / "open.pdf").unlink()
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(DataError, match=r"locked\.pdf: a PDF with a password$"):
        read_folder(tmp_path)


def test_a_folder_without_documents_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no document of \.txt, "):
        read_folder(tmp_path)
