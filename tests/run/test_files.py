"""Files that survive a kill or a full disk."""

import math
import os
from pathlib import Path

import pytest

from hfsft.run import files
from hfsft.run.files import read_json_lines, read_small, write_text_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "stage.json"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "new \ud800")  # a lone surrogate cannot be encoded
    assert path.read_text() == "old"
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["stage.json"]


def test_torn_lines_are_skipped_and_line_separators_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    text = '{"a": "x\u2028y"}\n{"half": "a li\n12\n\n{"loss": NaN}\n'
    path.write_bytes(text.encode() + b'{"a": "\xff')
    first, second = read_json_lines(path)
    assert first == {"a": "x\u2028y"} and math.isnan(second["loss"])
    assert read_json_lines(path, nan_as_none=True)[1] == {"loss": None}
    assert read_json_lines(tmp_path / "missing.jsonl") == []


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    """Else a power cut after the rename leaves an empty file under the name."""
    path, done = tmp_path / "stage.json", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("flushed"), fsync(number)))
    monkeypatch.setattr(
        Path, "replace", lambda old, new: (done.append(old.read_text()), replace(old, new))
    )
    write_text_atomically(path, "new")
    assert done == ["flushed", "new"] and path.read_text() == "new"


def test_what_is_no_plain_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(files, "LARGEST", 100)
    (tmp_path / "large").write_text("x" * 101)
    for path in tmp_path.iterdir():
        with pytest.raises(OSError, match=r"is not a plain file|has 101 bytes"):
            read_small(path)
    (tmp_path / "large").write_text("é" * 50)
    assert read_small(tmp_path / "large") == "é" * 50


def test_a_write_follows_no_link_and_trips_over_nothing(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    path = tmp_path / "stage.json"
    path.symlink_to(theirs)
    for name in ("stage.json.partial", f"stage.json.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(theirs)
    write_text_atomically(path, "new")
    assert path.read_text() == "new" and not path.is_symlink()
    assert theirs.read_text() == "theirs"
