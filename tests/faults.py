"""Kill a stage at random moments, give the same command until it is done, compare the bits.

    python tests/faults.py FOLDER [--rounds 50] [--configs sft,lora] [--seed 0] [--signal KILL]

Every round is a run of its own: it is killed up to three times, and must end with the weights, the
optimizer's states and the log of one that was left alone. Prints a line a configuration.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import yaml

# imported before the forks: no child pays for it, and none inherits a running thread
from hfsft import base, mid, sft
from hfsft.errors import HfsftError

STEPS = 6
MODEL = {
    "model_type": "nanochat",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}
EVERY_STEP = {"logging_steps": 2, "save_steps": 1, "eval_steps": 3, "max_steps": STEPS}
RECIPE = {
    "name": "start",
    "model": MODEL,
    "tokenizer": {"train": True},
    "base": {
        "data": [{"path": "facts", "rows": 200}],
        "held_out": 10,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 256,
        **EVERY_STEP,
    },
    "mid": {
        "data": [{"path": "small_talk", "rows": 60}],
        "held_out": 6,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 256,
        **EVERY_STEP,
    },
    "sft": {
        "data": [{"path": "simple_spelling", "rows": 60}],
        "held_out": 6,
        "examples_per_step": 8,
        "max_length": 64,
        "learning_rate": 1e-3,
        **EVERY_STEP,
    },
}
# configuration → the stage, and what is added to its command line
CONFIGS = {
    "base": (base, ()),
    "mid": (mid, ("--dataloader_num_workers", "1")),
    "sft": (sft, ()),
    "lora": (sft, ("--lora.r", "4", "--lora.lora_dropout", "0.1")),
    "workers": (sft, ("--dataloader_num_workers", "2", "--optim", "adamw_torch")),
}


def start(stage, *argv: str) -> int:
    """Run a stage in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        stage.main(*argv)
        status = 0
    except HfsftError as error:
        print(error, file=sys.stderr)
        status = error.exit_status
    finally:
        sys.stderr.flush()
        os._exit(status)


def end(child: int) -> int:
    """Wait for a process; its exit status, below 0 after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def bits(folder: Path) -> dict[str, str]:
    """Digests of what a run leaves: weights, optimizer states, and the log without its seconds."""
    found = {}
    for name in ("model.safetensors", f"checkpoints/checkpoint-{STEPS}/optimizer.pt"):
        found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    found["metrics.jsonl"] = json.dumps(sorted(kept, key=lambda line: (line["step"], sorted(line))))
    return found


def rounds(name: str, recipe: Path, count: int, number: int, rng: random.Random) -> dict[str, int]:
    """Break a configuration so many times; what happened."""
    stage, extra = CONFIGS[name]
    stage_name = stage.__name__.split(".")[1]
    home = recipe.parent / "runs"

    def run(run_name: str) -> int:
        if stage is mid or stage is sft:
            start_from = home / "start" / ("base" if stage is mid else "mid")
            return start(
                stage,
                str(recipe),
                "--name",
                run_name,
                "--quiet",
                *extra,
                "--model_name_or_path",
                str(start_from),
            )
        return start(stage, str(recipe), "--name", run_name, "--quiet", *extra)

    began = time.monotonic()
    assert end(run(f"{name}-whole")) == 0
    lasted = time.monotonic() - began
    expected = bits(home / f"{name}-whole" / stage_name)
    seen = {"rounds": count, "kills": 0, "during a save": 0, "other statuses": 0, "mismatches": 0}
    for index in range(count):
        run_name = f"{name}-{index}"
        folder = home / run_name / stage_name
        for _ in range(rng.randint(1, 3)):
            child = run(run_name)
            time.sleep(rng.uniform(0.05, 1.0) * lasted)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            status = end(child)
            if status == 0:
                break
            seen["kills"] += 1
            seen["during a save"] += (folder / "checkpoints" / "partial").exists()
            seen["other statuses"] += status not in (-number, 128 + number)
        seen["other statuses"] += end(run(run_name)) != 0
        found = bits(folder)
        seen["mismatches"] += found != expected
        for what in expected:
            if found[what] != expected[what]:
                print(f"{run_name}: {what}\n  {expected[what]}\n  {found[what]}", flush=True)
    return seen


def main() -> None:
    """Break every configuration; exit 1 if one ended otherwise than a run left alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT", "HUP"))
    given = parser.parse_args()
    number = signal.Signals[f"SIG{given.signal}"]
    recipe = given.folder / "faults.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(given.folder / "runs")}))
    for stage in (base, mid):
        assert end(start(stage, str(recipe), "--quiet")) == 0
    failed = False
    for name in given.configs.split(","):
        seen = rounds(name, recipe, given.rounds, number, random.Random(f"{given.seed}:{name}"))
        print(
            f"{name}: " + ", ".join(f"{count} {what}" for what, count in seen.items()), flush=True
        )
        failed = failed or seen["mismatches"] or seen["other statuses"]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
