"""Time from the command to the first step, beside a stock trl script on the same job.

    python benchmarks/start.py [--rows 22443] [--runs 3]

22,443 generated conversations in a file, 200 steps of 32, a model of 0.5 M parameters, so that
start-up and preparation dominate. "cold" has an empty datasets cache, "warm" is the same command
again. Timed is from the command to the end of the first step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRL = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        open("trl-step", "w").close()
model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
rows = load_dataset("json", data_files="chats.jsonl", split="train")
args = SFTConfig(
    output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=16, max_steps=200,
    max_length=1024, assistant_only_loss=True, bf16=False, use_cpu=True, report_to="none",
)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
trainer.add_callback(Say())
trainer.train()
"""
# tool → its command, and the file that appears once the first step is done
TOOLS = {
    "hfsft": (["-m", "hfsft.sft", "recipe.yaml", "--restart"], "runs/start/sft/metrics.jsonl"),
    "trl": (["-c", TRL], "trl-step"),
}
RECIPE = """
name: start
sft:
  model_name_or_path: model
  data: [{path: chats.jsonl}]
  max_steps: 200
  eval_steps: -1
  optim: adamw_torch
  gradient_checkpointing: true
  logging_steps: 1
"""


def prepare(folder: Path, rows: int) -> None:
    """Write the conversations, a small model with its tokenizer, and the recipe."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfsft.data.tasks import facts, task_rows
    from hfsft.tokens.tokenizer import train_tokenizer

    tasks = ("identity", "small_talk", "simple_spelling", "spelling_bee", "arithmetic")
    with (folder / "chats.jsonl").open("w") as file:
        for task in tasks:
            for row in task_rows(task, rows=-(-rows // len(tasks)), seed=1):
                texts = [
                    message
                    if isinstance(message["content"], str)
                    else message | {"content": "".join(p["text"] for p in message["content"])}
                    for message in row["messages"]
                ]
                file.write(json.dumps({"messages": texts}) + "\n")
    tokenizer = train_tokenizer(facts(), 4096)
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)


def first_step(tool: str, folder: Path, cache: str) -> float:
    """Seconds from the command to the end of the first step, after which it is killed."""
    command, sign = TOOLS[tool]
    (folder / sign).unlink(missing_ok=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"HF_DATASETS_CACHE": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not ((folder / sign).exists() and (tool == "trl" or (folder / sign).stat().st_size)):
        if process.poll() is not None:
            sys.exit(process.stderr.read())
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def main() -> None:
    """Time both, cold and warm, and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=22443)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.rows)
        for run in range(given.runs):
            for tool in TOOLS:
                cache = str(folder / f"cache-{tool}-{run}")
                for kind in ("cold", "warm"):
                    seconds.setdefault(f"{tool}, {kind}", []).append(
                        first_step(tool, folder, cache)
                    )
    for kind in ("cold", "warm"):
        ours, theirs = seconds[f"hfsft, {kind}"], seconds[f"trl, {kind}"]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(f"{kind}: hfsft {mine:.1f} s, trl {other:.1f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
