"""The `generation_config.json` of a finished model: how it wants to be sampled, and where it ends.

Without `do_sample: true` in that file transformers' pipelines and its server decode greedily at any
temperature. vLLM reads its sampling settings as the defaults of a request, and its `max_new_tokens`
as the most that any request may ask for.
"""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from hfsft.evaluation.answering import NANOCHAT_BOS
from hfsft.recipe.key import UNSET
from hfsft.recipe.schema import Stage
from hfsft.recipe.sections import GENERATION
from hfsft.tokens.foreign_templates import special_tokens

MOST_NEW_TOKENS = 1024

# a base model's end of a document, which an answer may end with as well as with its turn's end
DOCUMENT_ENDS = (NANOCHAT_BOS, "<|endoftext|>")


def write_generation_config(folder: Path, stage: Stage, config: Any, tokenizer: Any) -> None:
    """Write the file into a saved model's folder.

    Args:
        folder: the model's.
        stage: `generation` holds the recipe's settings.
        config: the model's, with the length of its context.
        tokenizer: of the model, with its EOS and pad tokens.
    """
    defaults = {name: one.default for name, one in GENERATION.items() if one.default is not UNSET}
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        defaults["max_new_tokens"] = min(MOST_NEW_TOKENS, max(1, positions // 2))
    settings = defaults | stage.generation
    if not settings["do_sample"]:  # transformers refuses them, unless they are set, without it
        settings = {
            name: value
            for name, value in settings.items()
            if name in stage.generation or name not in ("temperature", "top_k")
        }
    GenerationConfig(
        **settings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def end_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the end of its turn, and that of a document, if any."""
    special = special_tokens(tokenizer)
    ends = [tokenizer.eos_token, *(token for token in DOCUMENT_ENDS if token in special)]
    return tokenizer.convert_tokens_to_ids(list(dict.fromkeys(ends)))
