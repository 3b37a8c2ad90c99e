"""The tokenizer: trained on base text, or loaded and prepared for chat.

Every tokenizer that is trained with has a chat template, an EOS token that ends the assistant's
turns, and a pad token that is not its EOS token.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState

from hfsft.errors import ModelError, RecipeError
from hfsft.hub.client import NOT_LOADED, require_model, why_not_loaded
from hfsft.recipe.schema import DEFAULT_PRE_TOKENIZER, Recipe, Stage
from hfsft.run.disk import writing_to
from hfsft.tokens.foreign_templates import TemplateError
from hfsft.tokens.turns import end_of_turn

# karpathy/nanochat's nine, in its order, and a pad token of its own: as the embedding's padding_idx
# it gets no gradient, so no token with a meaning can serve
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|pad|>",
)

# The regex of each pre-tokenizer that a tokenizer can be trained with. llama.cpp has the regexes of
# the first two compiled in, under these names; it reads no other, nor the third.
PRE_TOKENIZERS = {
    # Qwen2's (Qwen/Qwen2-0.5B, tokenizer.json): every digit is a token
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Llama 3's (meta-llama/Meta-Llama-3-8B, tokenizer.json): numbers in groups of three digits
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # GPT-4's (openai/tiktoken, cl100k_base) with numbers of one or two digits, as in nanochat
    "nanochat": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}


MOST_GROWTH = 16  # of a text's length, by a normalizer
# hfsft's templates in their earlier versions, by the BLAKE2 digest of their text: they could write
# neither tools nor reasoning, and everything else, tool calls aside, as the present ones do
EARLIER = {
    "c859467a259c932e04448b2f707bf81a": "nanochat",
    "9d5e6cfc74fc68b53531cd4245c3e4a2": "chatml",
}

# how a server takes an answer apart, as transformers' `parse_response` reads it
REASONING = {"open_pattern": r"<think>\s*", "close_pattern": r"\s*</think>\s*"}
CALLS = {
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "nanochat": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant_start|>",
        "fields": {
            "reasoning_content": REASONING,
            # a calculator call is a python part too, but no JSON
            "tool_calls": CALLS
            | {"open_pattern": r'<\|python_start\|>(?=\{"name": )', "close": "<|python_end|>"},
            "content": {"close_pattern": r"<\|assistant_end\|>"},
        },
    },
    "chatml": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": REASONING,
            # with the line break before it, or that would be a content of its own
            "tool_calls": CALLS | {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>"},
            "content": {"close_pattern": r"<\|im_end\|>\s*"},
        },
    },
}


@cache
def template(name: str) -> str:
    """The text of one of hfsft's own chat templates: "nanochat" or "chatml"."""
    path = Path(__file__).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


# --- trained ---


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, pre_tokenizer: str = DEFAULT_PRE_TOKENIZER
) -> Any:
    """Train a byte-level BPE tokenizer with nanochat's special tokens.

    Args:
        texts: documents.
        vocab_size: tokens, including the ten special ones and the 256 bytes.
        pre_tokenizer: one of `PRE_TOKENIZERS`.

    Returns:
        A `PreTrainedTokenizerFast` with the nanochat chat template.

    Raises:
        RecipeError: if the text has too few distinct words for that many tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # as Llama 3's and llama.cpp's llama-bpe: a word that is a token is not built by merges
    whole_words = pre_tokenizer == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre_tokenizer]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise RecipeError(
            f"tokenizer: the base text yields only {size:,} tokens, not vocab_size: "
            f"{vocab_size:,}; lower vocab_size or add text"
        )
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=[
            token
            for token in SPECIAL_TOKENS
            if token not in ("<|bos|>", "<|assistant_end|>", "<|pad|>")
        ],
        clean_up_tokenization_spaces=False,
    )
    return _with_template(trained, "nanochat")


# --- loaded ---


def load_tokenizer(
    start: str,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a tokenizer and prepare it for chat.

    One without a chat template gets ChatML if its vocabulary has ChatML's tokens (SmolLM2's base
    models), else nanochat's tokens and template. For another template without `{% generation %}`
    marks, training uses trl's marked copy of it, if trl has one.

    Args:
        start: a folder or a Hub id.
        chat_template: "nanochat", "chatml", or a Jinja file, to replace the tokenizer's own.
        revision: of the Hub repository.
        trust_remote_code: run the repository's own Python code.

    Returns:
        A `PreTrainedTokenizerFast`; `hfsft_template` is "nanochat", "chatml" or None for another
        template, whose marked copy, if any, is `hfsft_training_template`.

    Raises:
        ModelError: if there is no such tokenizer, or the assistant's tokens cannot be identified.
        RecipeError: if `chat_template` is none of the three.
    """
    tokenizer = _load(start, revision, trust_remote_code)
    if chat_template is None and not tokenizer.chat_template:
        is_chatml = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
        chat_template = "chatml" if is_chatml else "nanochat"
    if chat_template in ("nanochat", "chatml"):
        tokenizer = _with_template(tokenizer, chat_template)
    else:
        if chat_template is not None:
            path = Path(chat_template)
            if not path.is_file():
                raise RecipeError(
                    f"tokenizer.chat_template: {chat_template} is not nanochat, chatml or a file"
                )
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer = _recognise_template(tokenizer, start)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        # if the pad were the EOS token, masking pads would keep a model from learning to stop
        known = ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")
        vocabulary = tokenizer.get_vocab()
        spare = [t for t in known if t in vocabulary and t != tokenizer.eos_token]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    return tokenizer


def _load(start: str, revision: str | None, trust_remote_code: bool) -> Any:
    """A fast tokenizer from a folder or the Hub, as it is."""
    from transformers import AutoTokenizer

    folder = Path(start)
    # a run's tokenizer/ holds no model
    if not (folder / "tokenizer.json").is_file() or (folder / "config.json").is_file():
        require_model(start, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            start, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # the tokenizers library raises Exception itself
        if type(error) is not Exception and not isinstance(error, NOT_LOADED):
            raise
        raise ModelError(f"{start}: cannot load its tokenizer: {why_not_loaded(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"{start}: has no fast tokenizer (tokenizer.json), which training needs")
    require_bounded(tokenizer, start)
    return tokenizer


def require_bounded(tokenizer: Any, start: str) -> None:
    """Check that a tokenizer's normalizer and decoder make no text many times as long.

    Raises:
        ModelError: if they can.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        if (made := getattr(backend, part, None)) is None:
            continue
        growth = _growth(json.loads(made.__getstate__()))
        if growth > MOST_GROWTH:
            raise ModelError(
                f"{start}: its tokenizer's {part} can make a text {growth:,.0f} times as long, "
                f"more than {MOST_GROWTH}"
            )


def _growth(step: Any) -> float:
    """The largest factor by which the steps of a normalizer or decoder lengthen a text."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"]) / 100  # once a text
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String") or ""  # a regular expression may match nothing
        return max(1.0, len(step["content"]) / max(1, len(pattern)))
    return math.prod(_growth(held) for held in step.values())


def _with_template(tokenizer: Any, name: str) -> Any:
    """Give a tokenizer one of hfsft's templates, its tokens, and its end-of-turn token as EOS."""
    tokens = SPECIAL_TOKENS if name == "nanochat" else ("<|im_start|>", "<|im_end|>")
    # even if they are in the vocabulary: as plain tokens they could be written inside a message
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False
    )
    if name == "nanochat":
        tokenizer.bos_token, tokenizer.eos_token = "<|bos|>", "<|assistant_end|>"
    else:
        tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template(name)
    return _recognise_template(tokenizer, name)


def _recognise_template(tokenizer: Any, start: str) -> Any:
    """Set `hfsft_template` and `hfsft_training_template`, and the EOS token of another template.

    One of hfsft's own in an earlier version is replaced by the present one.
    """
    names = EARLIER | {_digest(template(name)): name for name in RESPONSES}
    text = tokenizer.chat_template
    tokenizer.hfsft_template = names.get(_digest(text)) if isinstance(text, str) else None
    tokenizer.hfsft_training_template = None
    if tokenizer.hfsft_template is not None:
        tokenizer.chat_template = template(tokenizer.hfsft_template)
        tokenizer.response_template = RESPONSES[tokenizer.hfsft_template]
    else:
        from trl.chat_template_utils import (
            add_response_schema,
            get_training_chat_template,
            has_generation_markers,
        )

        if not isinstance(tokenizer.chat_template, str):
            raise ModelError(
                f"{start}: has several chat templates; choose one with tokenizer: "
                "{chat_template: FILE}"
            )
        if has_generation_markers(tokenizer.chat_template):
            tokenizer.hfsft_training_template = tokenizer.chat_template
        else:
            # trl looks the template up by its text; the stand-in spares its unbounded rendering
            stand_in = SimpleNamespace(
                chat_template=tokenizer.chat_template, apply_chat_template=lambda *_, **__: ""
            )
            with contextlib.suppress(ValueError):  # trl does not know the template
                tokenizer.hfsft_training_template = get_training_chat_template(stand_in)
        if tokenizer.response_template is None:
            with contextlib.suppress(ValueError):
                add_response_schema(tokenizer)
        try:
            tokenizer.eos_token = end_of_turn(tokenizer)
        except TemplateError as error:
            raise ModelError(
                f"{start}: cannot train with its chat template: {error}\n  Choose another: "
                "tokenizer: {chat_template: FILE}, or chatml, or nanochat"
            ) from None
    return tokenizer


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- a stage's ---


def base_tokenizer(recipe: Recipe, texts: Iterable[str], resuming: bool) -> Any:
    """The tokenizer of the base stage: trained, trained before the run was resumed, or loaded.

    Args:
        recipe: the `Recipe`; a trained tokenizer is saved in `<run>/tokenizer/`.
        texts: base documents to train on; read only if one is trained.
        resuming: the run resumes from a checkpoint, with the tokenizer it started with.

    Returns:
        As `load_tokenizer`.
    """
    folder = recipe.folder / "tokenizer"
    if recipe.tokenizer.get("train"):
        state = PartialState()
        if state.is_main_process and not resuming:
            trained = new_tokenizer(recipe, texts)
            with writing_to(folder):
                trained.save_pretrained(folder)
        state.wait_for_everyone()
        return load_tokenizer(str(folder))
    return new_tokenizer(recipe, texts)


def new_tokenizer(recipe: Recipe, texts: Iterable[str]) -> Any:
    """The tokenizer of a recipe's `tokenizer` section, trained on `texts` or loaded."""
    settings = recipe.tokenizer
    if not settings.get("train"):
        return load_tokenizer(
            settings["path"],
            settings.get("chat_template"),
            settings.get("revision"),
            recipe.trust_remote_code,
        )
    limit = settings.get("max_chars", 200_000_000)  # counting the words of so many takes some 8 GB
    vocab_size = settings.get("vocab_size") or recipe.model["vocab_size"]
    pre_tokenizer = settings.get("pre_tokenizer", DEFAULT_PRE_TOKENIZER)
    return train_tokenizer(_take_chars(texts, limit), vocab_size, pre_tokenizer)


def stage_tokenizer(recipe: Recipe, stage: Stage) -> Any:
    """The tokenizer of the model a stage starts from, with the recipe's chat template, if any."""
    return load_tokenizer(
        stage.model_name_or_path,
        recipe.tokenizer.get("chat_template"),
        stage.revision,
        recipe.trust_remote_code,
    )


def _take_chars(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts up to so many characters in total, the last one truncated."""
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
