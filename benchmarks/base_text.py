"""How base text preparation grows: 10 MB against 200 MB, beside trl's own on the same text.

    python benchmarks/base_text.py

Writes JSON lines of the embedded speeches and facts, repeated with a number in each document so
that no two are the same, into a temporary folder. Each measurement is a process of its own: its
peak memory is the operating system's (ru_maxrss), its time is the preparation's, without imports.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES_MB = (10, 200)
LENGTH = 2048


def write_corpus(path: Path, megabytes: int) -> None:
    """Write about so many megabytes of JSON lines."""
    from hfsft.tasks import facts, speeches

    documents = [part for speech in speeches() for part in speech.split("\n\n")] + facts()
    written = count = 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            line = json.dumps({"text": f"{count}. {documents[count % len(documents)]}"})
            file.write(line + "\n")
            written += len(line) + 1
            count += 1


def prepare_hfsft(path: str, tokenizer_folder: str) -> int:
    """Tokens that hfsft prepares; memory-mapped rows of at most 2,048."""
    from hfsft.corpus import mix_text
    from hfsft.recipe import load_recipe
    from hfsft.tokenizer import load_tokenizer

    recipe = load_recipe(
        *("demo", "--base.data", f"[{{path: {path}}}]", "--base.max_length", str(LENGTH)),
        *("--base.tokens_per_step", "null", "--model.max_position_embeddings", str(LENGTH)),
    )
    rows = mix_text(recipe, load_tokenizer(tokenizer_folder)).train
    return sum(len(ids) for batch in rows.iter(1000) for ids in batch["input_ids"])


def prepare_trl(path: str, tokenizer_folder: str) -> int:
    """Tokens that trl prepares: `datasets.map` row by row as SFTTrainer does, then pack_dataset."""
    import datasets
    from trl import pack_dataset

    from hfsft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    rows = datasets.load_dataset("json", data_files=path, split="train")
    rows = rows.map(lambda row: {"text": row["text"] + tokenizer.eos_token})
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]})
    rows = pack_dataset(rows.select_columns(["input_ids"]), LENGTH, "bfd")
    return sum(len(ids) for batch in rows.iter(1000) for ids in batch["input_ids"])


def measure(name: str, path: str, tokenizer_folder: str) -> None:
    """Print tokens, seconds and peak memory of one preparation as JSON."""
    import datasets
    import trl  # noqa: F401  # both pay for the same imports

    import hfsft.corpus  # noqa: F401

    datasets.disable_progress_bars()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    tokens = {"hfsft": prepare_hfsft, "trl": prepare_trl}[name](path, tokenizer_folder)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"tokens": tokens, "seconds": seconds, "idle_kb": idle, "peak_kb": peak}))


def main() -> None:
    """Measure both at both sizes and print a table."""
    from hfsft.tasks import facts, speeches
    from hfsft.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder = str(Path(folder) / "tokenizer")
        train_tokenizer([*speeches(), *facts()], 4096).save_pretrained(tokenizer_folder)
        print(f"{'':8}{'MB':>5}{'tokens':>14}{'seconds':>9}{'tokens/s':>11}{'peak MiB':>10}")
        for megabytes in SIZES_MB:
            path = Path(folder) / f"{megabytes}.jsonl"
            write_corpus(path, megabytes)
            for name in ("hfsft", "trl"):
                done = subprocess.run(
                    [sys.executable, __file__, name, str(path), tokenizer_folder],
                    capture_output=True,
                    text=True,
                    check=True,
                    env={"HF_DATASETS_CACHE": f"{folder}/cache", "PATH": "", "HOME": folder},
                )
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{name:8}{megabytes:5}{found['tokens']:14,}{found['seconds']:9.1f}"
                    f"{found['tokens'] / found['seconds']:11,.0f}"
                    f"{found['peak_kb'] / 1024:10,.0f}"
                )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(*sys.argv[1:])
    else:
        main()
