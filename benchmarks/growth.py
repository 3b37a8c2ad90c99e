"""How cost scales: preparation with the number of rows, speed and memory with `max_length`.

    python benchmarks/growth.py

Preparation: 2,000 and 20,000 generated conversations, every one encoded (one epoch). Steps: those
of benchmarks/step.py at max_length 256 to 2,048, conversations joined until they are that long.
Each measurement is a process of its own; memory is the process's (ru_maxrss).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = (2_000, 20_000)
LENGTHS = (256, 512, 1024, 2048)


def prepare(folder: str, rows: int) -> dict[str, float]:
    """Encode so many conversations."""
    import datasets

    from hfsft.data.mixture import mix_conversations
    from hfsft.data.tasks import facts
    from hfsft.recipe.schema import Source, Stage
    from hfsft.tokens.tokenizer import train_tokenizer

    datasets.disable_progress_bars()
    tasks = ("identity", "small_talk", "simple_spelling", "spelling_bee", "arithmetic")
    stage = Stage(
        name="sft",
        folder=Path(folder),
        seed=42,
        data=[Source(task, rows=rows // len(tasks)) for task in tasks],
        held_out=0,
        max_length=1024,
        examples_per_step=32,
        assistant_only_loss=True,
        trainer={"num_train_epochs": 1},
        quiet=True,
    )
    tokenizer = train_tokenizer(facts(), 4096)
    began = time.perf_counter()
    train = mix_conversations(stage, tokenizer).train
    return {"seconds": time.perf_counter() - began, "tokens": sum(train.lengths)}


def steps(length: int, count: int = 6) -> dict[str, float]:
    """Steps of 8 rows of that length, two a micro-batch, two documents a row."""
    import torch

    from hfsft.data.packing import StepCollator, micro_batches, model_inputs
    from hfsft.model.attention import packed_attention
    from hfsft.model.head import fuse_head

    sys.path.insert(0, str(Path(__file__).parent))
    from step import build

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda"
    model = build("llama", 8192).to(device).train()
    model.config.max_position_embeddings = length
    fuse_head(model)
    model.set_attn_implementation(packed_attention(model, device, half, length))
    documents = [torch.randint(10, 8000, (length // 2,)).tolist() for _ in range(16)]
    step = StepCollator(9, length)([{"input_ids": ids, "labels": ids} for ids in documents])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ends = []
    for _ in range(count):
        for part in micro_batches(step, 2):
            inputs = {
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in model_inputs(part).items()
            }
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = model(**inputs)[0]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if half:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return {"seconds": (ends[-1] - ends[0]) / (count - 1), "tokens": 8 * length}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, size = given.child
        with tempfile.TemporaryDirectory() as folder:
            found = prepare(folder, int(size)) if what == "rows" else steps(int(size))
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    for what, sizes in (("rows", ROWS), ("max_length", LENGTHS)):
        print(f"{what:>10}{'seconds':>9}{'tokens/s':>10}{'peak MiB':>10}")
        for size in sizes:
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", what, str(size)],
                    capture_output=True,
                    text=True,
                    env=os.environ | {"HF_DATASETS_CACHE": cache},
                )
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            speed = found["tokens"] / found["seconds"]
            print(f"{size:10,}{found['seconds']:9.2f}{speed:10,.0f}{found['peak']:10,.0f}")


if __name__ == "__main__":
    main()
