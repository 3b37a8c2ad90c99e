"""How base text preparation scales from 10 MB to 200 MB, next to trl's on the same text.

    python benchmarks/base_text.py

Writes JSON lines of the embedded speeches and facts, repeated with a number in each document so
that no two are equal, into a temporary folder. Each measurement is a process of its own. Time is
the preparation's, without imports, which are the same for both; memory is in MiB:

own     peak of the process's own memory (RssAnon, sampled every 20 ms), imports included
imports how much of it the imports took
mapped  peak of mapped file pages (RssFile): code, and the Arrow files that both keep their rows in;
        the operating system reclaims these when it needs the memory
total   the operating system's peak of both together (ru_maxrss)

With sizes as arguments (in MB), it measures those; with a name before them, that one alone:
python benchmarks/base_text.py hfsft 10 200. trl's part at 200 MB takes the longest.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SIZES_MB = (10, 200)
NAMES = ("hfsft", "trl")
MEMORY = ("own", "imports", "mapped", "total")
LENGTH = 2048


def write_corpus(path: Path, megabytes: int) -> None:
    """Write about so many megabytes of JSON lines."""
    from hfsft.data.tasks import facts, speeches

    documents = [part for speech in speeches() for part in speech.split("\n\n")] + facts()
    written = count = 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            line = json.dumps({"text": f"{count}. {documents[count % len(documents)]}"})
            file.write(line + "\n")
            written += len(line) + 1
            count += 1


def prepare_hfsft(path: str, tokenizer_folder: str) -> Any:
    """Rows of at most 2,048 tokens as hfsft prepares them."""
    from hfsft.data.text import mix_text
    from hfsft.recipe.loading import load_recipe
    from hfsft.tokens.tokenizer import load_tokenizer

    recipe = load_recipe(
        *("demo", "--base.data", f"[{{path: {path}}}]", "--base.max_length", str(LENGTH)),
        *("--base.tokens_per_step", "null", "--model.max_position_embeddings", str(LENGTH)),
    )
    return mix_text(recipe, load_tokenizer(tokenizer_folder)).train


def prepare_trl(path: str, tokenizer_folder: str) -> Any:
    """Rows as trl prepares them: `datasets.map` row by row as SFTTrainer does, then packed."""
    import datasets
    from trl import pack_dataset

    from hfsft.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    rows = datasets.load_dataset("json", data_files=path, split="train")
    rows = rows.map(lambda row: {"text": row["text"] + tokenizer.eos_token})
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]})
    return pack_dataset(rows.select_columns(["input_ids"]), LENGTH, "bfd")


def resident() -> dict[str, int]:
    """MiB of the process's own memory (`RssAnon`) and mapped files (`RssFile`); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) // 1024
        for line in lines
        if line.startswith(("RssAnon", "RssFile"))
    }


def measure(name: str, path: str, tokenizer_folder: str) -> None:
    """Print tokens, seconds and peak memory of one preparation as JSON."""
    import datasets
    import pyarrow.compute as pc
    import trl  # noqa: F401

    import hfsft.data.text  # noqa: F401

    datasets.disable_progress_bars()
    imports = resident()
    peak, done = dict(imports), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for kind, size in resident().items():
                peak[kind] = max(peak[kind], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    rows = {"hfsft": prepare_hfsft, "trl": prepare_trl}[name](path, tokenizer_folder)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    # before the count, which reads the rows
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    lengths = [pc.list_value_length(batch["input_ids"]) for batch in rows.data.to_batches()]
    tokens = sum(pc.sum(part).as_py() for part in lengths)
    found = {"own": peak["RssAnon"], "imports": imports["RssAnon"], "mapped": peak["RssFile"]}
    print(json.dumps({"tokens": tokens, "seconds": seconds, **found, "total": total}))


def main(*argv: str) -> None:
    """Measure both, or the one named, at each size and print a table."""
    from hfsft.data.tasks import facts, speeches
    from hfsft.tokens.tokenizer import train_tokenizer

    names = [name for name in NAMES if name in argv] or NAMES
    sizes = [int(size) for size in argv if size not in NAMES] or SIZES_MB
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder = str(Path(folder) / "tokenizer")
        train_tokenizer([*speeches(), *facts()], 4096).save_pretrained(tokenizer_folder)
        print(
            f"{'':8}{'MB':>5}{'tokens':>14}{'seconds':>9}{'tokens/s':>11}"
            + "".join(f"{kind:>9}" for kind in MEMORY)
        )
        for megabytes in sizes:
            path = Path(folder) / f"{megabytes}.jsonl"
            write_corpus(path, megabytes)
            for name in names:
                done = subprocess.run(
                    [sys.executable, __file__, "measure", name, str(path), tokenizer_folder],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "HOME": folder},
                )
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{name:8}{megabytes:5}{found['tokens']:14,}{found['seconds']:9.1f}"
                    f"{found['tokens'] / found['seconds']:11,.0f}"
                    + "".join(f"{found[kind]:9,}" for kind in MEMORY),
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
