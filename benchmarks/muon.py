"""Muon against AdamW: the tokens each needs to AdamW's final validation loss.

    python benchmarks/muon.py [--depth 2] [--steps 200] [--seeds 1 2 3] [--results muon.json]

Base stages of hfsft on real text: by default the embedded speeches (3 MB) and facts; `--data` takes
any text that a recipe does. Where torch sees a GPU they run there. In three parts:

1. Both are tuned with seed 0 and as many tries: AdamW over six learning rates; Muon over three
   learning rates of the matrices with two of AdamW's part. All else is the same.
2. With each seed, AdamW trains for `--steps` at its best setting.
3. With the same seed, Muon trains at its best setting for several numbers of steps, each a whole
   run with its own schedule. Between them the steps to AdamW's final loss are interpolated.

`--results` keeps the loss of each run: the same command resumes. One more seed costs one more run
of AdamW and one of Muon for each of SHARES.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import yaml

from hfsft import base
from hfsft.run.files import write_text_atomically

ADAMW_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
MUON_RATES = (0.01, 0.02, 0.04)  # of the blocks' matrices
OTHER_RATES = (4e-3, 1.6e-2)  # of AdamW's part beside Muon
SHARES = (1.0, 0.8, 0.65, 0.5)  # of `--steps`, that Muon trains for
TUNING_SEED = 0


def recipe_of(options: argparse.Namespace) -> dict:
    """What all runs share."""
    return {
        "name": "run",
        "model": {
            "depth": options.depth,
            "vocab_size": options.vocab_size,
            "max_position_embeddings": options.length,
        },
        "tokenizer": {"train": True},
        "sample_prompts": [],
        "base": {
            "data": options.data,
            "held_out": options.held_out,
            "eval_budget": 1.0,
            "save_strategy": "no",
            "tokens_per_step": options.tokens_per_step,
            "per_device_train_batch_size": options.rows,
            "per_device_eval_batch_size": options.rows,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": 0.5,
                "decay_type": "linear",
                "min_lr_ratio": 0.05,
            },
        },
    }


class Runs:
    """Trains, or looks up, the final validation loss of a run."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.recipe, self.folder = recipe_of(options), folder
        self.path = Path(options.results) if options.results else folder / "muon.json"
        self.kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if self.kept.setdefault("recipe", self.recipe) != self.recipe:
            raise SystemExit(f"{self.path} is of other settings; give --results another name")

    def loss(self, seed: int, steps: int, **settings: object) -> float:
        """The validation loss after so many steps; settings are overrides of the base stage."""
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        key = " ".join([f"seed {seed}, {steps} steps", *words])
        if key not in self.kept:
            name = f"{len(self.kept)}"
            file = self.folder / "r.yaml"
            # the tokenizer of the first run serves all
            trained = self.folder / "tokenizer"
            tokenizer = {"path": str(trained)} if trained.is_dir() else {"train": True}
            runs = {"output_dir": str(self.folder), "tokenizer": tokenizer, "name": name}
            file.write_text(yaml.safe_dump(self.recipe | runs))
            words += ["--max_steps", str(steps), "--eval_steps", str(steps)]  # 1.0: every step
            base.main(str(file), "--seed", str(seed), "--quiet", *words)
            if not trained.is_dir():
                (self.folder / name / "tokenizer").rename(trained)
            record = json.loads((self.folder / name / "base" / "stage.json").read_text())
            self.kept[key] = record["eval_loss"]
            write_text_atomically(self.path, json.dumps(self.kept, indent=1) + "\n")
        print(f"{self.kept[key]:.4f}  {key}", flush=True)
        return self.kept[key]


def muon(rates: tuple[float, float]) -> dict[str, object]:
    """The settings of Muon with a learning rate of the matrices, and one of AdamW's part."""
    return {"optim": "muon", "muon.learning_rate": rates[0], "learning_rate": rates[1]}


def steps_to(loss: float, curve: list[tuple[int, float]]) -> float | None:
    """The steps at which a curve of (steps, final loss) reaches a loss; None: not within it.

    Args:
        loss: to reach.
        curve: by rising steps.
    """
    if curve[0][1] <= loss:
        return float(curve[0][0])  # at most so many
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss < high:
            return before + (high - loss) / (high - low) * (after - before)
    return None


def main() -> None:
    """Tune both, train both with each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens_per_step", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32, help="of a micro-batch")
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--held_out", type=float, default=0.05)
    parser.add_argument("--data", nargs="+", default=["speeches", "facts"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", help="a JSON file that keeps the losses")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        runs, steps = Runs(options, Path(name)), options.steps
        adamw = {
            rate: runs.loss(TUNING_SEED, steps, optim="adamw_torch_fused", learning_rate=rate)
            for rate in ADAMW_RATES
        }
        tried = [(matrices, other) for matrices in MUON_RATES for other in OTHER_RATES]
        muons = {rates: runs.loss(TUNING_SEED, steps, **muon(rates)) for rates in tried}
        best, best_muon = min(adamw, key=adamw.get), min(muons, key=muons.get)
        print(f"best: AdamW {best:g}; Muon {best_muon[0]:g} and {best_muon[1]:g} beside it")
        found = []
        for seed in options.seeds:
            goal = runs.loss(seed, steps, optim="adamw_torch_fused", learning_rate=best)
            counts = sorted(round(share * steps) for share in SHARES)
            curve = [(count, runs.loss(seed, count, **muon(best_muon))) for count in counts]
            found.append((seed, goal, curve, steps_to(goal, curve)))
    print("seed  AdamW's loss  Muon's at the same tokens  Muon's tokens to AdamW's loss")
    for seed, goal, curve, needed in found:
        share = "not reached" if needed is None else f"{needed / steps:.0%}"
        share = f"at most {share}" if needed == curve[0][0] else share
        print(f"{seed:4}  {goal:12.4f}  {curve[-1][1]:25.4f}  {share:>29}")
    if all(needed is not None for *_, needed in found):
        shares = [needed / steps for *_, needed in found]
        print(f"Muon needs {1 - statistics.mean(shares):.0%} fewer tokens (mean of the seeds)")


if __name__ == "__main__":
    main()
