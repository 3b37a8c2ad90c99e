"""The tokenizer: trained on base text or loaded, with chat tokens, a template, and its own pad."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState

from hfsft.errors import ModelError, RecipeError
from hfsft.hub.client import NOT_LOADED, require_model, why_not_loaded
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.disk import writing_to
from hfsft.tokens.templates import TemplateError, end_of_turn

# karpathy/nanochat's nine, in its order, and a pad: as an embedding's padding_idx it gets no
# gradient, so it can be no token that means anything
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


# GPT-4's split (openai/tiktoken, cl100k_base) with numbers of one or two digits, as nanochat has it
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@cache
def template(name: str) -> str:
    """The text of a chat template that comes with hfsft: "nanochat" or "chatml"."""
    path = Path(__file__).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with nanochat's split and special tokens.

    Args:
        texts: documents.
        vocab_size: tokens in all, the ten special ones and the 256 bytes among them.

    Returns:
        A `PreTrainedTokenizerFast` with the nanochat chat template.

    Raises:
        RecipeError: if the text holds too few different words for that many tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
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
            f"tokenizer: the base text yields {size:,} tokens only, not vocab_size: "
            f"{vocab_size:,}; ask for fewer or give it more text"
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


def load_tokenizer(
    start: str,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a tokenizer and make it fit for chat.

    One without a chat template gets ChatML where its vocabulary has ChatML's tokens (SmolLM2's base
    models), else nanochat's tokens and template. A foreign template without `{% generation %}`
    marks is trained with trl's marked copy of it.

    Args:
        start: a folder or a Hub id.
        chat_template: "nanochat", "chatml", or a Jinja file, to replace what the tokenizer brings.
        revision: of the Hub repository.
        trust_remote_code: run the repository's own Python code.

    Returns:
        A `PreTrainedTokenizerFast`; `hfsft_template` names its template if it is one of ours, else
        `hfsft_training_template` holds the marked template to train with.

    Raises:
        ModelError: if there is no such tokenizer, or no way to tell its assistant's tokens.
    """
    from transformers import AutoTokenizer

    if not (Path(start) / "tokenizer.json").is_file():
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
    if chat_template is None and not tokenizer.chat_template:
        is_chatml = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
        chat_template = "chatml" if is_chatml else "nanochat"
    if chat_template in ("nanochat", "chatml"):
        tokenizer = _with_template(tokenizer, chat_template)
    elif chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise RecipeError(
                f"tokenizer.chat_template: {chat_template} is neither nanochat, chatml nor a file"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer = _recognise_template(tokenizer, start)
    else:
        tokenizer = _recognise_template(tokenizer, start)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        # a pad that is the end token teaches a model never to stop, wherever pads are masked
        known = ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")
        vocabulary = tokenizer.get_vocab()
        spare = [t for t in known if t in vocabulary and t != tokenizer.eos_token]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    return tokenizer


def _with_template(tokenizer: Any, name: str) -> Any:
    """Give a tokenizer one of our templates, the tokens it needs, and its end-of-turn as eos."""
    tokens = SPECIAL_TOKENS if name == "nanochat" else ("<|im_start|>", "<|im_end|>")
    # also those in the vocabulary: as plain tokens they could be written inside a message
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
    """Note which template a tokenizer has, and which marked one to train with."""
    tokenizer.hfsft_template = next(
        (name for name in ("nanochat", "chatml") if tokenizer.chat_template == template(name)), None
    )
    tokenizer.hfsft_training_template = None
    if tokenizer.hfsft_template is None:
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if not isinstance(tokenizer.chat_template, str):
            raise ModelError(
                f"{start}: has several chat templates; choose one with tokenizer: "
                "{chat_template: FILE}"
            )
        if has_generation_markers(tokenizer.chat_template):
            tokenizer.hfsft_training_template = tokenizer.chat_template
        else:
            # trl looks it up by its text; what it renders before, unbounded, decides nothing here
            stand_in = SimpleNamespace(
                chat_template=tokenizer.chat_template, apply_chat_template=lambda *_, **__: ""
            )
            with contextlib.suppress(ValueError):  # a template that trl does not know
                tokenizer.hfsft_training_template = get_training_chat_template(stand_in)
        try:
            tokenizer.eos_token = end_of_turn(tokenizer)
        except TemplateError as error:
            raise ModelError(
                f"{start}: cannot train with its chat template: {error}\n  Give another: "
                "tokenizer: {chat_template: FILE}, or chatml, or nanochat"
            ) from None
    return tokenizer


def base_tokenizer(recipe: Recipe, texts: Iterable[str], resuming: bool) -> Any:
    """The tokenizer of a run that begins with base: trained before, trained now, or loaded.

    Args:
        recipe: the `Recipe`; a trained tokenizer is kept in `<run>/tokenizer/`.
        texts: base documents to train on; read only if one is trained.
        resuming: the run goes on from a checkpoint, with the tokenizer it began with.

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
    """The tokenizer that a recipe's `tokenizer` section asks for, trained on `texts` or loaded."""
    settings = recipe.tokenizer
    if not settings.get("train"):
        return load_tokenizer(
            settings["path"],
            settings.get("chat_template"),
            settings.get("revision"),
            recipe.trust_remote_code,
        )
    limit = settings.get("max_chars", 200_000_000)  # some 8 GB of memory for the counts of words
    vocab_size = settings.get("vocab_size") or recipe.model["vocab_size"]
    return train_tokenizer(_take_chars(texts, limit), vocab_size)


def stage_tokenizer(recipe: Recipe, stage: Stage) -> Any:
    """The tokenizer of the model a stage starts from, with the recipe's chat template if any."""
    return load_tokenizer(
        stage.model_name_or_path,
        recipe.tokenizer.get("chat_template"),
        stage.revision,
        recipe.trust_remote_code,
    )


def _take_chars(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
