"""SFT steps side by side: hfsft, stock SFTTrainer in three variants, and a bare PyTorch loop.

    python benchmarks/step.py [--data CHATS.jsonl] [--model_type llama] [--runs 3] [--steps 6]
    python benchmarks/step.py --base    # a base step of 8 full rows beside its bare loop

The same model, the same 32 conversations per step, the same optimizer. Each run is a process of its
own, the variants alternate, and the table shows medians. Tokens exclude padding; the first two
steps of a run are not counted. Without --data the conversations are those of the built-in tasks.
Peak memory is the process's (ru_maxrss), on CUDA the allocator's; there the card is capped at
--memory, and MFU is 6 · parameters · tokens/s over the card's dense bfloat16 peak; an untied
embedding is not among these parameters, as it multiplies nothing.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES, LENGTH, ROWS, SKIPPED = 32, 1024, 2, 2
VARIANTS = {
    "hfsft": "conversations of a step share rows",
    "bare": "a PyTorch loop over hfsft's micro-batches",
    "pairs": "SFTTrainer, in pairs, padded to the longer one",
    "padded": "SFTTrainer, in pairs, padded to max_length",
    "packing": "SFTTrainer, packing: true, two rows per micro-batch",
}
BASE_VARIANTS = {
    "hfsft": "8 rows of text, two per micro-batch",
    "bare": "a PyTorch loop over the same micro-batches",
}
BASE_ROWS = 8
PEAK_FLOPS = {"RTX 4060": 30e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16


def build(model_type: str, vocab_size: int) -> Any:
    """Build a model of 4 layers of width 256, on CUDA of 12 layers of width 768."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, width = (12, 768) if torch.cuda.is_available() else (4, 256)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width if model_type == "nanochat" else 8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=9,
    )
    return AutoModelForCausalLM.from_config(config)


def conversations(data: str | None, folder: str, steps: int) -> tuple[Any, Any]:
    """A tokenizer of 8,192 tokens, and the conversations of `steps` steps in hfsft's order."""
    from hfsft.data.mixture import mix_conversations
    from hfsft.data.tasks import facts, speeches
    from hfsft.recipe.schema import Source, Stage
    from hfsft.tokens.tokenizer import load_tokenizer, train_tokenizer

    if not (Path(folder) / "tokenizer").is_dir():
        trained = train_tokenizer([*speeches(), *facts()], 8192)
        trained.save_pretrained(str(Path(folder) / "tokenizer"))
    tokenizer = load_tokenizer(str(Path(folder) / "tokenizer"))
    tasks = ("identity", "small_talk", "spelling_bee", "simple_spelling", "arithmetic")
    sources = [Source(data)] if data else [Source(task, rows=400) for task in tasks]
    stage = Stage(
        name="sft",
        folder=Path(folder),
        seed=42,
        data=sources,
        held_out=0,
        max_length=LENGTH,
        max_steps=steps,
        examples_per_step=EXAMPLES,
        assistant_only_loss=True,
        on_bad_rows="skip",
        quiet=True,
    )
    return tokenizer, mix_conversations(stage, tokenizer).train


class Clock:
    """Records the end of each step, and the energy of those that are counted."""

    def __init__(self, device: Any, steps: int):
        self.device, self.steps, self.ends, self.read = device, steps, [], []

    def tick(self) -> None:
        """Record the end of a step."""
        import torch

        from hfsft.train.measuring import joules

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if len(self.ends) + 1 == SKIPPED:  # reading takes time that is not counted
            self.read.append(joules(self.device))
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.steps:
            self.read.append(joules(self.device))

    def joules(self) -> dict[str, float]:
        """Joules of the counted steps, where the device counts them."""
        return {} if None in self.read else {"joules": self.read[1] - self.read[0]}

    def seconds(self) -> float:
        """Seconds of the counted steps."""
        return self.ends[-1] - self.ends[SKIPPED - 1]


def text_rows(tokenizer: Any, steps: int) -> Any:
    """Full rows of the embedded speeches, enough for `steps` base steps."""
    import datasets

    from hfsft.data.tasks import speeches

    ids = [token for text in speeches() for token in tokenizer.encode(text)]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    return datasets.Dataset.from_dict({"input_ids": rows[: steps * BASE_ROWS]})


def run(
    variant: str,
    make: Callable[[int], Any],
    data: str | None,
    folder: str,
    steps: int,
    base: bool = False,
    **settings: Any,
) -> dict:
    """Train with one variant, and measure it; `make` builds the model for a vocabulary's size."""
    import datasets
    import torch
    import transformers
    from transformers import TrainerCallback

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    tokenizer, rows = conversations(data, folder, steps)
    rows = rows.conversations.select(rows.indices).select_columns(["input_ids", "labels"])
    examples = EXAMPLES
    if base:
        rows, examples = text_rows(tokenizer, steps), BASE_ROWS
    model = make(len(tokenizer))
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, steps)

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick()

    losses, tokens = (
        [],
        [
            sum(map(len, rows[step * examples : (step + 1) * examples]["input_ids"]))
            for step in range(steps)
        ],
    )
    used = ROWS
    if variant == "bare":
        losses = bare_loop(model, rows, tokenizer, device, clock, examples)
    else:
        trainer, packed = trainer_of(variant, model, rows, tokenizer, folder, steps, **settings)
        tokens = packed or tokens
        trainer.add_callback(Tick())
        trainer.train()
        if variant == "hfsft":
            used = trainer.rows  # fewer, if memory ran out
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak, idle = torch.cuda.max_memory_reserved(), 0
    seconds, counted = clock.seconds(), sum(tokens[SKIPPED:])
    return {
        "tokens_a_second": counted / seconds,
        "seconds_a_step": seconds / (steps - SKIPPED),
        "peak_bytes": peak,
        "idle_bytes": idle * 1024,
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_parameters": matmul_parameters(model),
        "micro_batch_rows": used,
    } | clock.joules()


def matmul_parameters(model: Any) -> int:
    """Parameters without an untied embedding, which is looked up and multiplies nothing."""
    tied = model.config.tie_word_embeddings
    looked_up = None if tied else model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if p is not looked_up)


def bare_loop(
    model: Any, rows: Any, tokenizer: Any, device: Any, clock: Clock, examples: int
) -> list[float]:
    """A minimal loop over hfsft's micro-batches: forward, backward, clipping, optimizer."""
    import torch

    from hfsft.data.packing import StepCollator, micro_batches, model_inputs
    from hfsft.model.attention import packed_attention
    from hfsft.model.head import fuse_head

    half = device.type == "cuda"
    model.to(device).train()
    fuse_head(model)
    model.set_attn_implementation(packed_attention(model, device, half, LENGTH))
    collate = StepCollator(tokenizer.pad_token_id, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, weight_decay=0.0)
    losses = []
    for start in range(0, len(rows), examples):
        step = collate([rows[i] for i in range(start, start + examples)])
        trained = (step["labels"] != -100).sum()
        total = 0.0
        for part in micro_batches(step, ROWS):
            inputs = {
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in model_inputs(part).items()
            }
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = model(**inputs)[0] / trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        clock.tick()
    return losses


def trainer_of(
    variant: str,
    model: Any,
    rows: Any,
    tokenizer: Any,
    folder: str,
    steps: int,
    **changes: Any,
) -> tuple[Any, list[int] | None]:
    """The trainer of a variant; if rows are packed ahead of time, also each step's tokens."""
    import torch
    from trl import SFTConfig, SFTTrainer, pack_dataset

    settings = {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing": False,
        "report_to": "none",
    } | changes
    if variant == "hfsft":
        return hfsft_trainer(model, rows, tokenizer, folder, steps, settings), None
    accumulation, packed = EXAMPLES // ROWS, None
    if variant == "packing":
        import itertools

        rows = pack_dataset(rows, LENGTH, "bfd")
        # as many rows per step as hold about the tokens of 32 conversations
        accumulation = max(1, round(len(rows) / steps / ROWS))
        each = accumulation * ROWS
        lengths = itertools.cycle([len(ids) for ids in rows["input_ids"]])
        packed = [sum(itertools.islice(lengths, each)) for _ in range(steps)]
    args = SFTConfig(
        **settings,
        gradient_accumulation_steps=accumulation,
        # padding_free and liger are variants of gpu.py
        max_length=None if variant == "padding_free" else LENGTH,
        packing=variant == "packing",
        padding_free=variant == "padding_free",
        use_liger_kernel=variant == "liger",
        pad_to_multiple_of=LENGTH if variant == "padded" else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer
    ), packed


def hfsft_trainer(
    model: Any, rows: Any, tokenizer: Any, folder: str, steps: int, settings: dict[str, Any]
) -> Any:
    """hfsft's own trainer: for conversations, or for text if the rows have no labels."""
    from hfsft.recipe.schema import Stage
    from hfsft.train.arguments import arguments
    from hfsft.train.trainer import SFTStageTrainer, StageTrainer

    sft = "labels" in rows.column_names
    examples = EXAMPLES if sft else BASE_ROWS
    settings = {k: v for k, v in settings.items() if k not in ("output_dir", "max_steps")}
    stage = Stage(
        "sft" if sft else "base",
        Path(folder),
        42,
        [],
        0,
        max_length=LENGTH,
        max_steps=steps,
        examples_per_step=EXAMPLES,
        trainer=settings,
        quiet=True,
    )
    trainer = (SFTStageTrainer if sft else StageTrainer)(
        stage,
        examples,
        LENGTH,
        model=model,
        args=arguments(stage, rows, examples),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    if not sft:  # in the order of the bare loop
        trainer._get_train_sampler = lambda *_: range(len(rows))
    return trainer


def ceilings(data: str | None, folder: str, steps: int) -> dict[str, float]:
    """Row slots per token of each layout: the most that removing padding can gain."""
    from hfsft.data.packing import tightest_fit

    _, rows = conversations(data, folder, steps)
    lengths = rows.lengths
    tokens = sum(lengths)
    pairs = sum(2 * max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True))
    slots = 0
    for start in range(0, len(lengths), EXAMPLES):
        step = lengths[start : start + EXAMPLES]
        bins = tightest_fit(step, LENGTH)
        slots += len(bins) * max(sum(step[item] for item in items) for items in bins)
    return {
        "tokens per conversation": tokens / len(lengths),
        "pairs": pairs / tokens,
        "padded": LENGTH * len(lengths) / tokens,
        "filled": tokens / slots,
    }


def main() -> None:
    """Run every variant in turn and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="conversations, .jsonl; default: the built-in tasks")
    parser.add_argument("--model_type", default="llama", choices=("llama", "nanochat"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--memory", type=float, default=8.0, help="GB of a CUDA card to use")
    parser.add_argument("--base", action="store_true", help="a base step instead of an sft step")
    parser.add_argument("--variants", help="some of them, separated by commas")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        import torch

        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, given.memory * 1e9 / total))
        make = functools.partial(build, given.model_type)
        found = run(given.child, make, given.data, given.folder, given.steps, given.base)
        print(json.dumps(found))
        return
    variants = BASE_VARIANTS if given.base else VARIANTS
    names = given.variants.split(",") if given.variants else list(variants)
    with tempfile.TemporaryDirectory() as folder:
        ratio = ceilings(given.data, folder, given.steps)
        found: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(given.runs):
            for name, results in found.items():
                command = [*sys.argv, "--child", name, "--folder", folder]
                done = subprocess.run(
                    [sys.executable, *command], capture_output=True, text=True, env=os.environ
                )
                if done.returncode:
                    sys.exit(done.stderr)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    report(found, {} if given.base else ratio, given)


def report(found: dict[str, list[dict]], ratio: dict[str, float], given: Any) -> None:
    """Print medians, hfsft's speedup over each, and the ceiling given by padding."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{given.model_type}, {found['hfsft'][0]['parameters'] / 1e6:.1f} M parameters; "
        f"medians of {given.runs} runs"
    )
    if ratio:
        print(
            f"{ratio['tokens per conversation']:.0f} tokens per conversation; "
            f"row slots filled by step packing: {ratio['filled']:.3f}"
        )
    print(f"{'':9}{'tokens/s':>10}{'s/step':>8}{'peak MiB':>10}{'hfsft is':>10}{'ceiling':>9}")
    speed = {
        name: statistics.median(result["tokens_a_second"] for result in results)
        for name, results in found.items()
    }
    for name, results in found.items():
        seconds = statistics.median(result["seconds_a_step"] for result in results)
        peak = statistics.median(result["peak_bytes"] for result in results) / 2**20
        # each run against the hfsft run of the same round
        times = statistics.median(
            ours["tokens_a_second"] / theirs["tokens_a_second"]
            for ours, theirs in zip(found["hfsft"], results, strict=True)
        )
        ceiling = f"{ratio[name]:.2f}" if name in ratio else ""
        print(
            f"{name:9}{speed[name]:10,.0f}{seconds:8.2f}{peak:10,.0f}{times:9.2f}x{ceiling:>9}"
            f"  {(BASE_VARIANTS if given.base else VARIANTS)[name]}"
        )
    if cuda:
        peak = next((flops for card, flops in PEAK_FLOPS.items() if card in device), None)
        if peak:
            flops = 6 * found["hfsft"][0]["matmul_parameters"] * speed["hfsft"]
            print(f"hfsft: {flops / peak:.1%} of the card's dense bfloat16 peak (MFU)")
    ours = found["hfsft"][0]["losses"]
    for name in ("pairs", "padded", "bare"):
        if name in found:
            theirs = found[name][0]["losses"]
            error = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
            print(f"largest difference of the loss from {name}: {error:.1e}")


if __name__ == "__main__":
    main()
