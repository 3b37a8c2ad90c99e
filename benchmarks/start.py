"""From the command to the first step, beside a stock trl script on the same job.

    python benchmarks/start.py [--rows 22443] [--runs 3]

22,443 generated conversations in a file, 200 steps of 32, a model of 0.5 M parameters: what is
timed is starting and preparing. "cold" has an empty datasets cache, "warm" is the same command
again. The time is that of the whole command with a single step, the step's own 0.1 s included.
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

# stops after its first step, as the time of the command is to be that of the start
STOP = """
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        import os
        os._exit(0)
"""
HFSFT = (
    STOP
    + """
import sys
from hfsft import sft
import hfsft.trainer as trainer
made = trainer.SFTStageTrainer.__init__
def init(self, *args, **kwargs):
    made(self, *args, **kwargs)
    self.add_callback(Stop())
trainer.SFTStageTrainer.__init__ = init
sft.main("recipe.yaml", "--restart")
"""
)
TRL = (
    STOP
    + """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
rows = load_dataset("json", data_files="chats.jsonl", split="train")
args = SFTConfig(
    output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=16, max_steps=200,
    max_length=1024, assistant_only_loss=True, bf16=False, use_cpu=True, report_to="none",
)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
trainer.add_callback(Stop())
trainer.train()
"""
)
RECIPE = """
name: start
sft:
  model_name_or_path: model
  data: [{path: chats.jsonl}]
  max_steps: 200
  eval_steps: -1
  optim: adamw_torch
  gradient_checkpointing: true
"""


def prepare(folder: Path, rows: int) -> None:
    """Write the conversations, a small model with its tokenizer, and the recipe."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfsft.tasks import facts, task_rows
    from hfsft.tokenizer import train_tokenizer

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
            for tool, script in (("hfsft", HFSFT), ("trl", TRL)):
                env = os.environ | {"HF_DATASETS_CACHE": str(folder / f"cache-{tool}-{run}")}
                for kind in ("cold", "warm"):
                    began = time.perf_counter()
                    done = subprocess.run(
                        [sys.executable, "-c", script],
                        cwd=folder,
                        env=env,
                        capture_output=True,
                        text=True,
                    )
                    if done.returncode:
                        sys.exit(done.stderr)
                    seconds.setdefault(f"{tool}, {kind}", []).append(time.perf_counter() - began)
    for kind in ("cold", "warm"):
        ours, theirs = seconds[f"hfsft, {kind}"], seconds[f"trl, {kind}"]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(f"{kind}: hfsft {mine:.1f} s, trl {other:.1f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
