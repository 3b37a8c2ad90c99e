"""`hfsft data`: each stage's audit and its first examples, before anything trains."""

import itertools
import sys
from pathlib import Path
from typing import Any

import datasets
from rich.text import Text

from hfsft.data.audit import audit_console, print_audit
from hfsft.data.mixture import mix_conversations, refusal, require_rows
from hfsft.data.order import packing_order
from hfsft.data.text import base_texts, mix_text
from hfsft.recipe.schema import Recipe, Stage
from hfsft.tokens.encoding import IGNORED
from hfsft.tokens.tokenizer import new_tokenizer, stage_tokenizer


def preview(recipe: Recipe, show: int) -> dict[str, Any]:
    """Load and encode the data of every stage; nothing is written and no model is loaded.

    Args:
        recipe: a recipe with any stages.
        show: how many of each stage's first examples to return.

    Returns:
        Stage → `refused`: why training would stop at `on_bad_rows`, or None; `audit`; and
        `examples`: each a list of `{"text", "trained"}` segments in order.

    Raises:
        DataError, ModelError: as the stage itself would.
    """
    datasets.utils.logging.set_verbosity_error()
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    seen = {}
    for name, stage in recipe.stages.items():
        tokenizer = _tokenizer(recipe, stage)
        if name == "base":
            mixture = mix_text(recipe, tokenizer)
        else:
            mixture = mix_conversations(stage, tokenizer)
            require_rows(mixture, stage)
        first = itertools.islice(mixture.train, show)
        if name == "mid":  # its conversations are packed in this order
            order = packing_order(len(mixture.train), stage.seed)
            first = [mixture.train[index] for index in order[:show]]
        examples = [text_segments(row, tokenizer) for row in first]
        seen[name] = {
            "refused": refusal(mixture, stage),
            "audit": mixture.audit,
            "examples": examples,
        }
    return seen


def _tokenizer(recipe: Recipe, stage: Stage) -> Any:
    """The tokenizer that the stage will use; if it is yet to be trained, a temporary one."""
    start = stage.model_name_or_path
    if start is not None and (Path(start).is_dir() or "base" not in recipe.stages):
        return stage_tokenizer(recipe, stage)
    return new_tokenizer(recipe, base_texts(recipe.base))


def text_segments(row: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Decode an encoded example, split into trained and untrained segments.

    Args:
        row: `input_ids` and, for conversations, `labels`.
        tokenizer: the one that encoded it.

    Returns:
        `{"text", "trained"}` in order, special tokens included.
    """
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    found: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        trained = label != IGNORED
        if not found or found[-1][0] != trained:
            found.append((trained, []))
        found[-1][1].append(token)
    return [{"text": tokenizer.decode(run), "trained": trained} for trained, run in found]


def print_preview(seen: dict[str, Any]) -> None:
    """Print the tables and examples; trained text is bold, and green if the terminal has colors.

    Args:
        seen: as `preview` returns it.
    """
    console = audit_console()
    for stage, data in seen.items():
        if data["refused"] is not None:
            console.print(f"{stage}: training would stop: {data['refused']}", soft_wrap=True)
            console.print("To train on the rest: --on_bad_rows skip", soft_wrap=True)
        print_audit(stage, data["audit"], console)
        for number, example in enumerate(data["examples"], 1):
            console.print(f"\n{stage}, example {number} (bold is trained on):", style="dim")
            text = Text()
            for segment in example:
                text.append(segment["text"], style="bold green" if segment["trained"] else "")
            console.print(text, soft_wrap=True)
        console.print()
