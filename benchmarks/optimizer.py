"""What optimizers and dtypes of the weights cost in loss, beside AdamW in float32.

    pip install torchao apollo-torch
    python benchmarks/optimizer.py [--steps 300] [--results optimizer.json]

The sft stage of a model of 0.9 M parameters on built-in conversations, after a short base stage;
three seeds, the same data. Bytes a parameter are those of weights, gradients and the optimizer's
saved states. An optimizer whose package is not installed is left out, as are paged states and
offload where there is no GPU. `--results` keeps each run's figures: the same command resumes.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
import yaml

from hfsft import base, sft
from hfsft.model.optimizer import missing_package
from hfsft.plan.sizes import tensors_bytes
from hfsft.run.files import write_text_atomically

RECIPE = {
    "name": "start",
    "sample_prompts": [],
    "model": {"depth": 2, "vocab_size": 2048, "max_position_embeddings": 128},
    "tokenizer": {"train": True},
    "base": {
        "data": ["facts"],
        "held_out": 0,
        "max_length": 128,
        "max_steps": 100,
        "tokens_per_step": 2048,
    },
    "sft": {
        "model_name_or_path": "base",
        "data": [{"path": "small_talk", "rows": 3000}, {"path": "identity", "rows": 800}],
        "held_out": 200,
        "eval_budget": 1.0,
        "examples_per_step": 16,
        "per_device_train_batch_size": 16,
        "max_length": 128,
        "learning_rate": 3e-4,
        "gradient_checkpointing": False,
    },
}
NEAREST = ("--optim_args", "bf16_stochastic_round=False")
OFFLOAD = ("--gradient_checkpointing", "true")
OFFLOAD += ("--activation_checkpointing_kwargs", "{offload: true}")
# name in the table → optimizer, dtype of the weights, more of the command line
SETTINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "adamw_torch, float32": ("adamw_torch", "float32", ()),
    "adamw_torch, float32, offload": ("adamw_torch", "float32", OFFLOAD),
    "adamw_bnb_8bit, float32": ("adamw_bnb_8bit", "float32", ()),
    "paged_adamw_8bit, float32": ("paged_adamw_8bit", "float32", ()),
    "adamw_torch_8bit, bfloat16": ("adamw_torch_8bit", "bfloat16", ()),
    "the same, rounded to nearest": ("adamw_torch_8bit", "bfloat16", NEAREST),
    "adamw_torch_4bit, bfloat16": ("adamw_torch_4bit", "bfloat16", ()),
    "adamw_bnb_8bit, bfloat16": ("adamw_bnb_8bit", "bfloat16", ()),
    "apollo_adamw, bfloat16": ("apollo_adamw", "bfloat16", ()),
}


def available(name: str) -> bool:
    """Whether a setting runs here."""
    optim, _, more = SETTINGS[name]
    needs_gpu = "paged" in optim or more == OFFLOAD
    return missing_package(optim) is None and (torch.cuda.is_available() or not needs_gpu)


def train(recipe: Path, start: str, steps: int, seed: int, name: str) -> dict[str, float]:
    """Train one setting; returns its validation loss and its bytes a parameter."""
    optim, dtype, more = SETTINGS[name]
    run = f"{optim}-{dtype}-{len(more)}-{seed}"
    sft.main(
        *(str(recipe), "--name", run, "--seed", str(seed), "--quiet", "--max_steps", str(steps)),
        *("--model_name_or_path", start, "--optim", optim, "--dtype", dtype, *more),
        *("--eval_steps", str(steps), "--save_steps", str(steps)),  # 1.0 would be every step
    )
    folder = recipe.parent / run / "sft"
    record = json.loads((folder / "stage.json").read_text())
    checkpoint = folder / "checkpoints" / f"checkpoint-{steps}"
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    width = {"float32": 4, "bfloat16": 2}[dtype]
    states_each = tensors_bytes(states) / record["parameters"]
    return {"loss": record["eval_loss"], "bytes": 2 * width + states_each}


def main() -> None:
    """Train every setting with each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, help="a JSON file that keeps the figures")
    options = parser.parse_args()
    kept = {}
    if options.results and options.results.is_file():
        kept = json.loads(options.results.read_text())
    names = [name for name in SETTINGS if available(name)]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "r.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": folder}))
        base.main(str(recipe), "--quiet")
        start = str(Path(folder) / "start" / "base")
        for seed in options.seeds:
            for name in names:
                key = f"{name}; seed {seed}, {options.steps} steps"
                if key not in kept:
                    kept[key] = train(recipe, start, options.steps, seed, name)
                    if options.results:
                        text = json.dumps(kept, indent=1) + "\n"
                        write_text_atomically(options.results, text)
                print(f"{kept[key]['loss']:.4f}  {key}", flush=True)

    def figures(name: str, what: str) -> list[float]:
        return [kept[f"{name}; seed {n}, {options.steps} steps"][what] for n in options.seeds]

    print(f"{'':30}bytes a parameter  validation loss of each seed   mean difference")
    reference = figures(names[0], "loss")
    for name in names:
        losses = figures(name, "loss")
        shares = [loss / own - 1 for loss, own in zip(losses, reference, strict=True)]
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        size = figures(name, "bytes")[0]
        print(f"{name:30}{size:17.1f}  {shown:29} {statistics.mean(shares):+16.2%}")


if __name__ == "__main__":
    main()
