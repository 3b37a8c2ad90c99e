"""Saving."""

import hashlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hfsft.data.stream import TextStream


def data_fingerprint(train: Any, examples: int | None = None) -> dict[str, Any]:
    """What tells one training set from another.

    Args:
        train: sft's examples of the whole run, rows of mid or base, or a stream.
        examples: only the first so many; None: all.

    Returns:
        `examples` and their `digest`; of a stream neither is known.
    """
    if isinstance(train, TextStream):
        return {"examples": None, "digest": None}
    count = len(train) if examples is None else min(examples, len(train))
    if getattr(train, "cache_files", None) and "labels" not in train.column_names:
        # base text's cache is named by all that it depends on
        return {"examples": count, "digest": Path(train.cache_files[0]["filename"]).stem}
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(train, datasets.Dataset):
        for table in train.select(range(count)).with_format("arrow").iter(batch_size=1000):
            for name in sorted({"input_ids", "labels"} & set(table.column_names)):
                values = table[name].combine_chunks()
                digest.update(values.value_lengths().to_numpy())
                digest.update(values.flatten().to_numpy())
    else:
        for row in map(train.__getitem__, range(count)):
            digest.update(np.asarray([row["input_ids"], row["labels"]], dtype=np.int32))
    return {"examples": count, "digest": digest.hexdigest()}
