"""The demo with a mid stage and without one, at equal tokens: held-out words spelled right.

    python benchmarks/with_mid.py [--seeds 1 2 3] [--results with_mid.json]

With: recipes/demo.yaml as it is. Without: base, then sft alone on the conversations of both stages,
at mid's learning rates and with sft's schedule, for as many steps of 20 conversations as make the
tokens of mid and sft together. Some 10 minutes a seed on one core. `--results` keeps each run: the
same command resumes.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from hfsft import base, mid, sft
from hfsft.data.mixture import load_conversations
from hfsft.evaluation.evaluate import evaluate
from hfsft.recipe.loading import load_recipe
from hfsft.run.files import write_text_atomically
from hfsft.tokens.tokenizer import stage_tokenizer

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"
MAIN = {"base": base.main, "mid": mid.main, "sft": sft.main}


def without_mid() -> dict[str, Any]:
    """demo.yaml's stages as base and one sft stage, which has all conversations."""
    recipe = yaml.safe_load(DEMO.read_text())
    middle, last = recipe.pop("mid"), recipe["sft"]
    rows: Counter[str] = Counter()
    for source in middle["data"] + last["data"]:
        rows[source["path"]] += source["rows"]
    last["data"] = [{"path": path, "rows": count} for path, count in rows.items()]
    last |= {key: middle[key] for key in ("muon", "learning_rate", "max_length")}
    return recipe


def steps_of(path: Path, words: list[str], tokens: int) -> int:
    """The sft steps after which a recipe has trained on at least so many tokens."""
    recipe = load_recipe(str(path), *words, "--max_steps", "4000", stage="sft")
    train, _ = load_conversations(recipe.sft, stage_tokenizer(recipe, recipe.sft))
    size = recipe.sft.examples_per_step
    seen = itertools.accumulate(
        sum(train.lengths[start : start + size]) for start in range(0, len(train.lengths), size)
    )
    return next(step for step, total in enumerate(seen, 1) if total >= tokens)


def train(path: Path, folder: Path, seed: int, tokens: int | None) -> dict[str, Any]:
    """Train a recipe's stages.

    Args:
        path: of the recipe.
        folder: for its run.
        seed: of the run.
        tokens: of sft; None: its recipe's `max_steps`.

    Returns:
        `tokens` after base, `seconds` of training, and `right`: words of 100 that were not trained
        on, spelled after the last stage.
    """
    words = ["--seed", str(seed), "--output_dir", str(folder), "--name", "run", "--quiet"]
    found = {"tokens": 0, "seconds": 0.0}
    stages = load_recipe(str(path), *words).stages
    for name in stages:
        more = []
        if name == "sft" and tokens is not None:
            more = ["--max_steps", str(steps_of(path, words, tokens))]
        MAIN[name](str(path), *words, *more)
        record = json.loads((folder / "run" / name / "stage.json").read_text())
        found["tokens"] += record["tokens"] if name != "base" else 0
        found["seconds"] += record["seconds"]
    graded = evaluate(str(folder / "run" / "sft"), ["simple_spelling"], batch_size=50)["tasks"]
    return found | {"right": graded["simple_spelling"]["right"]}


def main() -> None:
    """Train both with each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, help="a JSON file that keeps each run's figures")
    options = parser.parse_args()
    kept = {}
    if options.results and options.results.is_file():
        kept = json.loads(options.results.read_text())
    print(f"{'seed':>4}  {'':12}{'tokens':>10}{'seconds':>9}{'right of 100':>14}")
    for seed in options.seeds:
        budget = None
        for kind in ("with mid", "without mid"):
            if (key := f"{kind}, seed {seed}") not in kept:
                with tempfile.TemporaryDirectory() as name:
                    folder, path = Path(name), DEMO
                    if kind == "without mid":
                        path = folder / "without.yaml"
                        path.write_text(yaml.safe_dump(without_mid()))
                    kept[key] = train(path, folder, seed, budget)
                if options.results:
                    write_text_atomically(options.results, json.dumps(kept, indent=1) + "\n")
            row = kept[key]
            budget = row["tokens"]
            print(
                f"{seed:>4}  {kind:12}{row['tokens']:>10,}{row['seconds']:>9.0f}{row['right']:>14}",
                flush=True,
            )
    for kind in ("with mid", "without mid"):
        right = [kept[f"{kind}, seed {seed}"]["right"] for seed in options.seeds]
        print(f"{kind}: mean {statistics.mean(right):.0f} of 100")


if __name__ == "__main__":
    main()
