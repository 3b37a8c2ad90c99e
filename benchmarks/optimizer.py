"""8-bit against 32-bit AdamW: size of the optimizer states, and the final loss of the same run.

    python benchmarks/optimizer.py [--steps 200]

The sft stage of a model of 1.5 M parameters on built-in conversations, after a short base stage;
three seeds.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
import yaml

from hfsft import base, sft

RECIPE = {
    "name": "start",
    "model": {"depth": 2, "vocab_size": 4096, "max_position_embeddings": 128},
    "tokenizer": {"train": True},
    "base": {
        "data": ["facts"],
        "held_out": 50,
        "max_length": 128,
        "max_steps": 100,
        "tokens_per_step": 2048,
    },
    "sft": {
        "model_name_or_path": "base",
        "data": [{"path": "small_talk", "rows": 2000}, {"path": "identity", "rows": 500}],
        "held_out": 200,
        "max_length": 128,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "save_steps": 1.0,
    },
}
OPTIMIZERS = ("adamw_torch", "adamw_bnb_8bit")


def state_bytes(held: object) -> int:
    """Total bytes of the tensors in an optimizer's saved state."""
    if isinstance(held, dict):
        return sum(state_bytes(value) for value in held.values())
    return held.numel() * held.element_size() if torch.is_tensor(held) else 0


def main() -> None:
    """Train with both; print bytes, losses and their differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in OPTIMIZERS}
    with tempfile.TemporaryDirectory() as name:
        recipe = Path(name) / "r.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": name}))
        base.main(str(recipe), "--quiet")
        start = str(Path(name) / "start" / "base")
        for seed in ("1", "2", "3"):
            for optim in OPTIMIZERS:
                run = f"{optim}-{seed}"
                sft.main(
                    *(str(recipe), "--name", run, "--seed", seed, "--optim", optim, "--quiet"),
                    *("--max_steps", str(steps), "--save_steps", str(steps)),
                    *("--eval_steps", str(steps), "--model_name_or_path", start),
                )
                folder = Path(name) / run / "sft"
                record = json.loads((folder / "stage.json").read_text())
                states = torch.load(
                    folder / "checkpoints" / f"checkpoint-{steps}" / "optimizer.pt",
                    weights_only=True,
                )
                found[optim].append((state_bytes(states["state"]), record["eval_loss"]))
    for optim, runs in found.items():
        losses = ", ".join(f"{loss:.4f}" for _, loss in runs)
        print(f"{optim:15} {runs[0][0] / 2**20:8.2f} MiB of states; validation {losses}")
    full, small = (found[optim] for optim in OPTIMIZERS)
    difference = statistics.median(b[1] / a[1] - 1 for a, b in zip(full, small, strict=True))
    print(f"8-bit: {small[0][0] / full[0][0]:.3f} of the bytes, loss {difference:+.2%} (median)")


if __name__ == "__main__":
    main()
