"""Memory predicted by `hfsft plan` beside what the same stage then allocates, in 18 settings.

    python benchmarks/planner.py

Each setting is a stage as `hfsft` runs it: two steps of a fresh model with full rows, in a
temporary folder. On a CPU the truth is the running total of the allocator's records
(torch.profiler), on a GPU torch.cuda.max_memory_allocated; neither includes the runtime overhead
that the plan states. Memory does not depend on load, so one run is enough.
"""

import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, NanoChatConfig, NanoChatForCausalLM

from hfsft import base, sft
from hfsft.data.tasks import facts
from hfsft.plan.plan import plan_stage
from hfsft.recipe.loading import load_recipe
from hfsft.tokens.tokenizer import train_tokenizer

ARCHITECTURES = {
    "nanochat": (NanoChatConfig, NanoChatForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
# name → width, layers, heads, vocabulary, tokens per row
SIZES = {
    "small": (128, 4, 2, 2048, 256),
    "medium": (256, 6, 4, 8192, 256),
    "large": (512, 8, 4, 32768, 256),
}
PLAIN = ("--gradient_checkpointing", "false", "--optim", "adamw_torch_fused")
CHECKPOINTING = ("--gradient_checkpointing", "true", "--optim", "adamw_torch_fused")
EIGHT_BIT = ("--gradient_checkpointing", "true", "--optim", "adamw_bnb_8bit")
LORA = (*EIGHT_BIT, "--lora.r", "16")
SETTINGS = [
    *((kind, size, "sft, full", PLAIN) for kind in ARCHITECTURES for size in SIZES),
    *((kind, size, "sft, full", EIGHT_BIT) for kind in ARCHITECTURES for size in SIZES),
    ("nanochat", "medium", "sft, full", LORA),
    ("llama", "medium", "sft, full", LORA),
    ("nanochat", "medium", "sft, packed", CHECKPOINTING),
    ("llama", "medium", "sft, packed", PLAIN),
    ("nanochat", "medium", "base, packed", PLAIN),
    ("llama", "medium", "base, packed", CHECKPOINTING),
]


def write_inputs() -> None:
    """Write a tokenizer, long and short conversations, and a recipe."""
    train_tokenizer(facts(), 512).save_pretrained("tokenizer")
    text = " ".join(facts())
    for name, count, chars in (("full", 60, 4000), ("packed", 300, 160)):
        with open(f"{name}.jsonl", "w") as file:
            for start in range(count):
                answer = text[start * 50 : start * 50 + chars]
                turns = [("user", f"{start}?"), ("assistant", answer)]
                messages = [{"role": role, "content": words} for role, words in turns]
                file.write(json.dumps({"messages": messages}) + "\n")
    shared = {"held_out": 0, "max_steps": 2, "per_device_train_batch_size": 4}
    shared |= {"save_strategy": "no", "logging_steps": 1}
    recipe = {
        "name": "planner",
        "model": {"model_type": "llama"},
        "tokenizer": {"path": "tokenizer"},
        "base": {"data": ["facts"], **shared},
        "sft": {
            "model_name_or_path": "model",
            "data": [{"path": "full.jsonl"}],
            "assistant_only_loss": False,
            "examples_per_step": 8,
            **shared,
        },
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))


def shape(kind: str, size: str) -> dict[str, int]:
    """The fields of a model's configuration for a size."""
    width, layers, heads, vocabulary, _ = SIZES[size]
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kind == "nanochat" else heads // 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
    }


def arguments(kind: str, size: str, rows: str, settings: tuple[str, ...]) -> tuple[str, list[str]]:
    """The stage and its command line; for sft, also writes the model that it starts from."""
    length = SIZES[size][-1]
    command = ["recipe.yaml", *settings, "--max_length", str(length), "--quiet"]
    if rows.startswith("base"):
        model = json.dumps({"model_type": kind, **shape(kind, size)})
        tokens = str(8 * length)
        return "base", [*command, "--model", model, "--tokens_per_step", tokens]
    config_class, model_class = ARCHITECTURES[kind]
    special = {"bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 9}
    model_class(config_class(**shape(kind, size), **special)).save_pretrained("model")
    for file in Path("tokenizer").iterdir():
        (Path("model") / file.name).write_bytes(file.read_bytes())
    if rows.endswith("packed"):
        command += ["--data", "[{path: packed.jsonl}]", "--examples_per_step", "64"]
    return "sft", command


def allocated(run: Callable[[], None]) -> int:
    """Peak bytes allocated while `run` runs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    live = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    os.chdir(tempfile.mkdtemp())
    write_inputs()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"MB on {device}; plan: seconds it took\n")
    print("model    size   rows         settings                   planned    real  ratio  plan")
    ratios = []
    for kind, size, rows, settings in SETTINGS:
        name, argv = arguments(kind, size, rows, settings)
        argv += ["--name", str(len(ratios))]
        recipe = load_recipe(*argv, stage=name)
        began = time.perf_counter()
        plan = plan_stage(recipe, recipe.stage(name))
        seconds = time.perf_counter() - began
        real = allocated(lambda name=name, argv=argv: {"base": base, "sft": sft}[name].main(*argv))
        planned = plan.peak - plan.overhead
        ratios.append(planned / real)
        words = "checkpointing " * plan.checkpointing + "8-bit " * ("8bit" in plan.optim)
        words += "LoRA" * (plan.trained_parameters < plan.parameters)
        print(
            f"{kind:8} {size:6} {rows:12} {words or 'plain':26} {planned / 1e6:7.1f} "
            f"{real / 1e6:7.1f}  {ratios[-1]:.3f}  {seconds:.1f}",
            flush=True,
        )
    print(f"\n{len(ratios)} settings, ratio {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
