"""Small files that unpack to gigabytes: CSV, text and Parquet are read in bounded memory."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from hfsft.data import row_sizes
from hfsft.data.json_rows import RowTooLong
from hfsft.data.row_sizes import longest_csv_row, parquet_batch
from hfsft.data.sources import load_rows
from hfsft.errors import DataError
from hfsft.recipe.schema import Source

MEGABYTE = 1 << 20

# loads a source in a process of its own: what it says, and by how many bytes its memory grew
LOAD = """
import json, resource, sys
import datasets
from hfsft.data.sources import load_rows
from hfsft.errors import DataError
from hfsft.recipe.schema import Source

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

datasets.disable_progress_bars()
before = peak()
try:
    said = f"{len(load_rows(Source(sys.argv[1]), 0))} rows"
except DataError as error:
    said = str(error)
print(json.dumps([said, peak() - before]))
"""


def pack(path: Path, *parts: tuple[bytes, int]) -> Path:
    """Write a compressed file of parts, each repeated."""
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else zstandard.open(path, "wb") as packed:
        for part, times in parts:
            for _ in range(times):
                packed.write(part)
    return path


def csv_of_one_cell(folder: Path) -> Path:
    cell = (b"x" * MEGABYTE, 700)
    return pack(folder / "r.csv.gz", (b"prompt,completion\nHi,", 1), cell, (b"\n", 1))


def csv_of_a_quoted_cell(folder: Path) -> Path:
    cell = (b"line\n" * (MEGABYTE // 5), 700)
    return pack(folder / "r.csv.zst", (b'prompt,completion\nHi,"', 1), cell, (b'"\n', 1))


def csv_of_many_rows(folder: Path) -> Path:
    row = b"Hi," + b"x" * 4000 + b"\n"
    return pack(folder / "r.csv.zst", (b"prompt,completion\n", 1), (row * 256, 1100))


def text_of_one_line(folder: Path) -> Path:
    return pack(folder / "r.txt.zst", (b"x" * MEGABYTE, 1500))


def text_of_many_lines(folder: Path) -> Path:
    return pack(folder / "r.txt.gz", (b"line\n" * (MEGABYTE // 5), 700))


def folder_with_a_long_line(folder: Path) -> Path:
    (folder / "r").mkdir()
    pack(folder / "r" / "a.txt.gz", (b"Hi.\n", 3), (b"x" * MEGABYTE, 700))
    return folder / "r"


def json_of_many_rows(folder: Path) -> Path:
    row = json.dumps({"prompt": "Hi", "completion": "x" * 4000}).encode() + b"\n"
    return pack(folder / "r.jsonl.zst", (row * 256, 1100))


def parquet_of_one_cell(folder: Path) -> Path:
    table = pa.table({"text": ["Hi.", "x" * (700 * MEGABYTE)]})
    pa.parquet.write_table(table, folder / "r.parquet", compression="zstd")
    return folder / "r.parquet"


def parquet_of_a_repeated_cell(folder: Path) -> Path:
    table = pa.table({"text": pa.array(["x" * MEGABYTE]).take(pa.array([0] * 1500))})
    pa.parquet.write_table(table, folder / "r.parquet", compression="zstd")
    return folder / "r.parquet"


def parquet_of_a_list_of_a_repeated_text(folder: Path) -> Path:
    once = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), ["x" * MEGABYTE])
    table = pa.table({"messages": pa.ListArray.from_arrays([0, 2000], once)})
    pa.parquet.write_table(table, folder / "r.parquet", compression="zstd", store_schema=False)
    return folder / "r.parquet"


BOMBS = {
    csv_of_one_cell: "row 1 is longer than 67,108,864 characters\n  If it is a row: raise max_row",
    csv_of_a_quoted_cell: "row 1 is longer than 67,108,864 characters\n  If it is a row: raise",
    csv_of_many_rows: "unpacks to more than 200 times its",
    text_of_one_line: "is one document of more than 67,108,864 bytes\n  If it is a row: raise max",
    text_of_many_lines: "is one document of more than 67,108,864 bytes",
    folder_with_a_long_line: "a.txt.gz: line 4 is longer than 67,108,864 bytes",
    json_of_many_rows: "unpacks to more than 200 times its",
    parquet_of_one_cell: "a column of ",
    parquet_of_a_repeated_cell: "a column of ",
    parquet_of_a_list_of_a_repeated_text: "row 0 is longer than 67,108,864 bytes\n  If it is a",
}


@pytest.mark.slow
@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_memory_does_not_follow_what_a_file_unpacks_to(make, tmp_path):
    path = make(tmp_path)
    files = [path] if path.is_file() else list(path.iterdir())
    assert sum(file.stat().st_size for file in files) < 4 * MEGABYTE
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True
    )
    said, grown = json.loads(run.stdout.splitlines()[-1])
    assert said.startswith(f"{path}: {BOMBS[make]}"), said
    assert len(said.splitlines()) == 2
    assert grown < 400 * MEGABYTE, f"{grown >> 20} MiB"


@pytest.mark.parametrize("name", ["r.csv.gz", "r.txt.zst", "r.jsonl.gz", "r.json.zst"])
def test_a_file_that_unpacks_to_far_too_much(name, tmp_path, monkeypatch):
    monkeypatch.setattr(row_sizes, "UNPACKED", 1 << 18)
    row = {"csv": b"a,b\n", "txt": b"Hi.\n", "jsonl": b'{"text": "Hi."}\n', "json": b"[1,\n"}
    path = pack(tmp_path / name, (row[name.split(".")[1]], 1), (b" \n" * 1000, 4000))
    with pytest.raises(DataError, match=r"200 times its .*\n.*: decompress it and name that file"):
        load_rows(Source(str(path)), 0)


def test_the_limit_is_that_of_the_source(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('prompt,completion\nHi,Ho\n"' + "a\n" * 600 + '",Yes\n')
    with pytest.raises(DataError, match="row 2 is longer than 1,000 characters"):
        load_rows(Source(str(path), max_row_bytes=1000), 0)
    assert len(load_rows(Source(str(path), max_row_bytes=1300), 0)) == 2
    (tmp_path / "r.txt").write_text("é" * 600)
    with pytest.raises(DataError, match="is one document of more than 1,000 bytes"):
        load_rows(Source(str(tmp_path / "r.txt"), max_row_bytes=1000), 0)
    assert len(load_rows(Source(str(tmp_path / "r.txt"), max_row_bytes=1200), 0)) == 1
    table = pa.table({"prompt": ["a", "b" * 2000], "completion": ["c", "d"]})
    pa.parquet.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match="row 1 is longer than 2,000 bytes"):
        load_rows(Source(str(tmp_path / "r.parquet"), max_row_bytes=2000), 0)
    rows = load_rows(Source(str(tmp_path / "r.parquet"), max_row_bytes=3000), 0)
    assert rows["prompt"][:] == ["a", "b" * 2000]


def test_a_csv_of_columns_by_the_million(tmp_path):
    (tmp_path / "r.csv").write_text("," * 20_000 + "\n")
    with pytest.raises(RowTooLong, match="row 0 has more than 10,000 cells"):
        longest_csv_row(tmp_path / "r.csv", 100_000)


def test_rows_of_every_type_are_measured_as_arrow_holds_them(tmp_path):
    messages = [{"role": "user", "content": "x" * 100, "parts": [["y" * 50], []]}]
    rows = pa.table(
        {
            "messages": [messages * 3, None, []],
            "image": [b"z" * 300, None, b""],
            "large": pa.array(["a" * 70, "", None], pa.large_string()),
            "pairs": pa.array([[("k" * 10, "v" * 20)], [], None], pa.map_("string", "string")),
            "fixed": pa.array([["f" * 40] * 2, ["", ""], None], pa.list_(pa.string(), 2)),
            "hash": pa.array([b"h" * 16] * 3, pa.binary(16)),
            "number": [1, 2, None],
        }
    )
    path = tmp_path / "r.parquet"
    pa.parquet.write_table(rows, path)
    texts = 3 * (4 + 100 + 50) + 300 + 70 + 30 + 80 + 16
    with pytest.raises(RowTooLong, match="row 0 "):
        parquet_batch(path, texts)
    assert parquet_batch(path, texts + 400) == 1024


def test_a_batch_of_long_rows_is_small(tmp_path, monkeypatch):
    pa.parquet.write_table(pa.table({"text": ["x" * 1000] * 50}), tmp_path / "r.parquet")
    monkeypatch.setattr(row_sizes, "HELD", 5050)
    assert parquet_batch(tmp_path / "r.parquet", 2000) == 5
