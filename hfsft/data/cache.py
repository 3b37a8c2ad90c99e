"""What is made of rows once and kept in the datasets cache."""

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

PACKAGE = Path(__file__).parents[1]
IMPORTS = re.compile(r"^\s*from hfsft\.?([\w.]*) import ([\w, ]*)", re.M)


@cache
def code_digest(module: str = "data/text", package: Path = PACKAGE) -> str:
    """A digest of the code that cached rows depend on: a module and all of hfsft it imports.

    Args:
        module: where to begin, by its path in the package; the default imports all that makes rows.
        package: hfsft's folder.
    """
    wanted, found = [module], {}
    while wanted:
        name = wanted.pop()
        path = package / f"{name}.py"
        if name not in found and path.is_file():
            found[name] = path.read_text(encoding="utf-8")
            for module, names in IMPORTS.findall(found[name]):
                folder = module.replace(".", "/")
                wanted += [folder, *(f"{folder}/{one.strip()}" for one in names.split(","))]
    return hashlib.blake2b(repr(sorted(found.items())).encode()).hexdigest()


def once(
    key: str, rows: Callable[[], Iterator[dict[str, Any]]], features: dict[str, Any]
) -> datasets.Dataset:
    """Rows that are made and written to the datasets cache once, and memory-mapped from then on.

    Args:
        key: says all that the rows depend on.
        rows: makes them; called only if the cache holds none of that key.
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
                for row in rows():
                    writer.write(row)
                writer.finalize()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def cache_file(key: str) -> Path:
    """Where the datasets cache keeps what this code makes of what `key` says."""
    name = hashlib.blake2b(f"{code_digest()}{key}".encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfsft"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def content_of(files: list[Path]) -> str:
    """A digest of what files hold."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def mapped(
    rows: datasets.Dataset,
    function: Callable[[dict[str, list[Any]]], Any],
    features: dict[str, Any],
    key: str,
    stage: Stage,
    shown: str,
) -> datasets.Dataset:
    """What a function makes of each batch of rows, in the cache under what `key` says."""
    path = cache_file(key)
    with writing_to(path.parent):
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            num_proc=stage.dataset_num_proc if len(rows) >= 1000 else None,
            desc=shown,
            features=datasets.Features(features),
            cache_file_name=str(path),
            new_fingerprint=path.stem,
        )
