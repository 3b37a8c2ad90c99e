"""The cache of prepared rows: Arrow files in the datasets cache, keyed by content and by code."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from hfsft.recipe.schema import Stage
from hfsft.run.disk import writing_to

BUFFERED = 1 << 26  # bytes of rows that are held in memory before they are written

PACKAGE = Path(__file__).parents[1]

# `from hfsft.a import b, c` on one line or in parentheses, and `import hfsft.a`
IMPORTS = re.compile(
    r"^[ \t]*(?:from (hfsft[\w.]*) import (?:\(([^)]*)\)|([^(\n]*))|import (hfsft[\w.]*))", re.M
)


# --- keys ---


@cache
def code_digest(module: str = "hfsft.data.text", package: Path = PACKAGE) -> str:
    """A digest of the code that cached rows depend on.

    Args:
        module: the module that makes the rows; the default imports all of them.
        package: hfsft's folder.
    """
    code = sorted(imported_code(module, package).items())
    return hashlib.blake2b(repr(code).encode()).hexdigest()


def imported_code(module: str, package: Path = PACKAGE) -> dict[str, str]:
    """The code of a module and of everything in hfsft that it imports, directly or not.

    Args:
        module: its dotted name, `hfsft` included.
        package: hfsft's folder.

    Returns:
        Dotted module name → source text. Imports within functions count too, and so do the
        packages that contain an imported module.
    """
    wanted, found = [module], {}
    while wanted:
        name = wanted.pop()
        path = package.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not path.is_file():  # `from hfsft.a import b`, where b is no module
            continue
        found[name] = path.read_text(encoding="utf-8")
        parent = name.rpartition(".")[0]
        wanted += [parent] if parent else []
        for source, bracketed, plain, module_alone in IMPORTS.findall(found[name]):
            imported = re.findall(r"(\w+)(?: as \w+)?", bracketed or plain)
            wanted += [source or module_alone, *(f"{source}.{one}" for one in imported)]
    return found


def cache_file(key: str) -> Path:
    """The cache file of the rows that `key` describes, as the current code makes them."""
    name = hashlib.blake2b(f"{code_digest()}{key}".encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfsft"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def files_digest(files: list[Path]) -> str:
    """A digest of the contents of files, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- rows ---


def cached_rows(
    key: str, rows: Callable[[], Iterator[dict[str, Any]]], features: dict[str, Any]
) -> datasets.Dataset:
    """Write rows to the cache once, and memory-map them from then on.

    Args:
        key: describes everything that the rows depend on, except the code.
        rows: generates them; called only if they are not cached.
        features: their columns.
    """
    path = cache_file(key)
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            with (
                writing_to(path.parent),
                ArrowWriter(path=str(partial), features=datasets.Features(features)) as writer,
            ):
                held = 0
                for row in rows():
                    writer.write(row)
                    held += sum(len(text) for text in row.values() if isinstance(text, str))
                    if held > BUFFERED:  # it keeps 1,000 rows, however long they are
                        writer.write_examples_on_file()
                        held = 0
                writer.finalize()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    made = datasets.Dataset.from_file(str(path))
    # datasets' own would name the cache file and its time; this one outlives the cache
    made._fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return made


def cached_map(
    rows: datasets.Dataset,
    function: Callable[[dict[str, list[Any]]], Any],
    features: dict[str, Any],
    key: str,
    stage: Stage,
    description: str,
) -> datasets.Dataset:
    """Map batches of rows to new rows, in the cache.

    Args:
        rows: the input.
        function: takes a batch as columns and returns the new rows' columns.
        features: of the new rows.
        key: describes everything that the new rows depend on, except the code.
        stage: its `dataset_num_proc` processes share 1,000 rows or more.
        description: the progress bar's.
    """
    path = cache_file(key)
    mean = rows.data.nbytes // max(len(rows.data), 1) + 1
    with writing_to(path.parent):
        return rows.map(
            function,
            batched=True,
            batch_size=max(1, min(1000, BUFFERED // mean)),
            remove_columns=rows.column_names,
            num_proc=stage.dataset_num_proc if len(rows) >= 1000 else None,
            desc=description,
            features=datasets.Features(features),
            cache_file_name=str(path),
            new_fingerprint=path.stem,
        )
