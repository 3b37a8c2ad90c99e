"""Throughput of preparing conversations, relative to the tokenizer's own batch encoder.

    python benchmarks/preparation.py [ROWS.jsonl [TOKENIZER_FOLDER]]

Prints two ratios of throughput, which carry over to other machines: the time that
`tokenizer.backend_tokenizer.encode_batch` takes for the messages' texts, divided by the time that
hfsft takes to encode the same conversations (templates, tokens, masks), and by that of the complete
preparation (reading and checking every row, encoding, the Arrow file, order, audit). The runs
alternate, and the medians are compared. Then the preparation is timed with a `max_steps` that uses
a tenth of the rows. Measured with the generated rows on two shared cores, in four runs: 0.96 to
1.06 and 0.85 to 0.95.
"""

import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets

from hfsft.data.mixture import mix_conversations
from hfsft.data.tasks import facts, speeches
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.encoding import fit_conversations
from hfsft.tokens.messages import Conversation
from hfsft.tokens.row_formats import read_row
from hfsft.tokens.tokenizer import load_tokenizer, train_tokenizer

PAIRS = 5
CONVERSATIONS = 6000
LENGTH = 2048


def write_conversations(path: Path) -> None:
    """Write chats of one to six exchanges, sentences of the embedded text: some 250 tokens each."""
    rng = random.Random(0)
    sentences = [s.strip() + "." for speech in speeches() for s in speech.split(".") if s.strip()]
    sentences += facts()
    with path.open("w") as file:
        for number in range(CONVERSATIONS):
            messages = []
            for _ in range(rng.choice((1, 1, 2, 2, 3, 6))):
                asked = f"({number}) " + " ".join(rng.sample(sentences, rng.randint(1, 2)))
                answer = " ".join(rng.sample(sentences, rng.randint(1, 5)))
                messages += [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answer},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")


def prepare(path: Path, tokenizer: object, folder: str, **settings: int) -> tuple[float, dict]:
    """Prepare an sft stage's conversations with an empty cache.

    Returns:
        Seconds, and the audit.
    """
    stage = Stage(
        name="sft",
        folder=Path(folder) / "sft",
        seed=42,
        data=[Source(str(path))],
        held_out=0,
        max_length=LENGTH,
        examples_per_step=32,
        assistant_only_loss=True,
        trainer={"num_train_epochs": 1},
        quiet=True,
        **settings,
    )
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        began = time.perf_counter()
        audit = mix_conversations(stage, tokenizer).audit
        return time.perf_counter() - began, audit


def encode(conversations: list[Conversation], tokenizer: object) -> float:
    """Seconds to encode conversations, a thousand at a time as the preparation does."""
    began = time.perf_counter()
    for start in range(0, len(conversations), 1000):
        fit_conversations(conversations[start : start + 1000], tokenizer, LENGTH)
    return time.perf_counter() - began


def main(path: str | None = None, tokenizer_folder: str | None = None) -> None:
    """Measure and print."""
    gc.freeze()  # as a stage does once its libraries are loaded
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(path or f"{folder}/rows.jsonl")
        if path is None:
            write_conversations(rows)
        if tokenizer_folder is None:
            tokenizer_folder = f"{folder}/tokenizer"
            train_tokenizer([*speeches(), *facts()], 4096).save_pretrained(tokenizer_folder)
        tokenizer = load_tokenizer(tokenizer_folder)
        lines = rows.read_text().splitlines()
        conversations = [read_row(json.loads(line), "messages") for line in lines]
        texts = [message["content"] for one in conversations for message in one.messages]
        backend = tokenizer.backend_tokenizer
        plain, encoding, complete = [], [], []
        for _ in range(PAIRS):
            began = time.perf_counter()
            encoded = backend.encode_batch(texts, add_special_tokens=False)
            tokens = sum(len(text.ids) for text in encoded)
            plain.append(time.perf_counter() - began)
            del encoded
            encoding.append(encode(conversations, tokenizer))
            seconds, audit = prepare(rows, tokenizer, folder)
            complete.append(seconds)
        print(f"{len(conversations):,} conversations, {tokens:,} tokens of text")
        print(f"encode_batch        {tokens / statistics.median(plain):11,.0f} tokens/s")
        for name, times in (("encoding", encoding), ("complete", complete)):
            ratio = statistics.median(a / b for a, b in zip(plain, times, strict=True))
            speed = tokens / statistics.median(times)
            print(f"hfsft, {name:12} {speed:11,.0f} tokens/s, {ratio:.2f} of it")
        steps = max(1, len(conversations) // 320)
        seconds, audit = prepare(rows, tokenizer, folder, max_steps=steps)
        print(
            f"{steps} steps of 32 prepare {audit['sources'][0]['prepared']:,} conversations for "
            f"{audit['used']:,} examples in {seconds:.2f} s instead of "
            f"{statistics.median(complete):.2f} s"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
