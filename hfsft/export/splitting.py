"""Which of llama.cpp's pre-tokenizers splits text into words as a tokenizer does.

A GGUF holds a tokenizer's tokens and merges but no regex: it names one of those that are compiled
into llama.cpp.
"""

import json
import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from hfsft.data.tasks import TASKS, facts, speeches, task_rows
from hfsft.errors import ModelError
from hfsft.tokens.tokenizer import PRE_TOKENIZERS

# those that hfsft writes, in the order they are tried (llama.cpp, src/llama-vocab.cpp)
NAMES = ("qwen2", "llama-bpe", "smollm", "gpt-2")

PASSAGES = 1000

# text that conversations contain and English prose does not
SCRIPTS = (
    "àéîõüßçñøåłžяжщїδπωאבגعربहिन्दीไทย한국어日本語中文\uff0c\u3002\uff01\uff1f"
    "「」😀👍🏽👨\u200d👩\u200d👧€£¥→≠²½Ⅷ٣৪"
)


def splitter(name: str) -> Any:
    """The pre-tokenizer that llama.cpp has under that name, as one of the tokenizers library."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, splitter("gpt-2")])
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[name]), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, last])


def split_as(backend: Tokenizer, name: str) -> Tokenizer:
    """A copy of a tokenizer that splits text as llama.cpp's pre-tokenizer of that name does.

    Unicode normalisation is kept, though llama.cpp has none: its own converter accepts that of
    Qwen's tokenizers too, and text in any usual file is normalised already.
    """
    copy = Tokenizer.from_str(backend.to_str())
    copy.pre_tokenizer = splitter(name)
    copy.model.ignore_merges = name == "llama-bpe"
    if copy.normalizer is not None and not isinstance(copy.normalizer, normalizers.NFC):
        copy.normalizer = normalizers.Sequence([])
    return copy


def choose_splitting(tokenizer: Any, start: str) -> tuple[str, int]:
    """The pre-tokenizer of llama.cpp that splits as a tokenizer does.

    Args:
        tokenizer: any fast one.
        start: the model, for the error.

    Returns:
        Its name, and how many of `passages` differ; always 0 but for a tokenizer that hfsft trained
        as nanochat's.

    Raises:
        ModelError: if it is not a byte-level BPE, or none of them splits all passages like it.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        raise ModelError(
            f"{start}: its tokenizer is not a byte-level BPE, the only kind that is exported"
        )
    own = _encoded(backend)
    counts = {name: _differing(own, _encoded(split_as(backend, name))) for name in NAMES}
    name = min(counts, key=counts.get)
    if counts[name] and PRE_TOKENIZERS["nanochat"] not in _patterns(state):
        raise ModelError(
            f"{start}: llama.cpp has no pre-tokenizer that splits text like its tokenizer: the "
            f"nearest, {name}, splits {counts[name]:,} of {PASSAGES:,} passages otherwise"
        )
    return name, counts[name]


def _patterns(state: dict[str, Any]) -> list[str]:
    """The regexes of a tokenizer's pre-tokenizer."""
    first = state["pre_tokenizer"] or {}
    parts = first.get("pretokenizers", [first])
    return [part["pattern"]["Regex"] for part in parts if "Regex" in part.get("pattern", ())]


def _encoded(backend: Tokenizer) -> list[list[int]]:
    encoded = backend.encode_batch(list(passages()), add_special_tokens=False)
    return [one.ids for one in encoded]


def _differing(one: list[list[int]], other: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


@cache
def passages() -> tuple[str, ...]:
    """1,000 short texts of every kind a model meets, the same every time.

    Prose with its numbers, conversations, Python source, and words of several scripts between
    digits, emoji and spaces. Some of it trains hfsft's demo; whether two tokenizers split it alike
    does not depend on that.
    """
    draw = random.Random(0)
    prose = "\n".join(speeches())
    found = [prose[at : at + 300] for at in draw.sample(range(len(prose) - 300), 350)]
    found += draw.sample(facts(), 150)
    for task in TASKS:
        for row in task_rows(task, 30, split="test", seed=0):
            found.append("\n".join(message["content"] for message in row["messages"]))
    code = "".join(Path(module.__file__).read_text("utf-8") for module in (json, random))
    found += [code[at : at + 300] for at in draw.sample(range(len(code) - 300), 150)]
    distinct = dict.fromkeys(unicodedata.normalize("NFC", text) for text in found)
    while len(distinct) < PASSAGES:
        distinct[unicodedata.normalize("NFC", _mixed(draw))] = None
    return tuple(distinct)


def _mixed(draw: random.Random) -> str:
    """Letters of one to three scripts, numbers, contractions, marks and spaces in any order."""
    kinds = (
        lambda: "".join(draw.choices(SCRIPTS, k=draw.randint(1, 6))),
        lambda: str(draw.randrange(10 ** draw.randint(1, 9))),
        lambda: draw.choice(("don't", "WE'LL", "I'm", "it\u2019s", "o'clock", "'Tis", "x's")),
        lambda: draw.choice(("...", "?!", "::=", "-->", "$5.00", "(a)", "\t", "\r\n", "\n\n\n")),
        lambda: " " * draw.randint(1, 5),
    )
    return "".join(draw.choice(kinds)() for _ in range(draw.randint(4, 20)))
