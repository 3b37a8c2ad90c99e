"""A recipe, its stages and their sources; the keys of a stage and of a source are declared here.

`Key` says what a declaration holds. The fields without one are no keys: hfsft fills them in.
"""

import re
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, quoted
from hfsft.recipe.key import FREE, SAME, key

MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)")


FORMATS = (
    "text",
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "multiple_choice",
    "gsm8k",
)


ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


# how a trained tokenizer splits text into words: one of `tokens.tokenizer.PRE_TOKENIZERS`
DEFAULT_PRE_TOKENIZER = "qwen2"


MUON = "muon"  # the optimizer that transformers has no name for


# the keys of base that set its length by the size of its model
PER_PARAMETER = ("tokens_per_parameter", "tokens_per_scaling_parameter")


LOADING = ("mid", "sft")  # the stages that load an existing model


@dataclass(frozen=True)
class Source:
    """One source of rows in a stage's `data`."""

    path: str = key("a built-in task, a local file, folder or glob, or a dataset on the Hub")
    name: str | None = key("the dataset's configuration, such as ARC-Easy", default=None)
    split: str = key("the dataset's split", default="train")
    revision: str | None = key("a commit, branch or tag of a Hub dataset", default=None)
    rows: int | None = key(
        "keep a seeded sample of this many rows; null keeps all",
        default=None,
        low=1,
        high=2**40,
    )
    first: bool = key("keep the first `rows` instead of a sample", default=False)
    repeat: int = key("how often an epoch sees each kept row", default=1, low=1, high=1000)
    weight: float = key(
        "multiplies `repeat`: 0.5 sees half the rows, 2.5 sees all twice and half once more",
        default=1.0,
        above=0,
        high=1000,
    )
    seed: int | None = key(
        "for the sample, or a built-in task's rows; without it the recipe's seed",
        default=None,
        null=False,
        low=0,
        high=2**32 - 1,
    )
    streaming: bool = key("read while training instead of before; base text only", default=False)
    max_row_bytes: int = key(
        "a longer line of a JSON file is refused, and counted; a longer row of another file is an "
        "error. Bounds what one row takes in memory",
        default=64 * 2**20,
        low=1,
        high=2**33,
    )
    columns: dict = key("renames columns: the format's column → the source's", default={})
    format: str | None = key(
        "null: recognised by the columns; `text` is for base, the rest for mid and sft",
        default=None,
        choices=FORMATS,
    )

    @property
    def copies(self) -> float:
        """How often an epoch sees each kept row."""
        return self.repeat * self.weight

    def __str__(self) -> str:
        name = f":{self.name}" if self.name else ""
        return self.path + name + (f"[{self.split}]" if self.split != "train" else "")

    @property
    def seed_name(self) -> str:
        """What a sample is seeded with beside the seed; without the split, as it always was."""
        return str(replace(self, split="train"))


@dataclass(frozen=True)
class Replay(Source):
    """The source of a stage's `replay`: general conversations, against forgetting."""

    share: float = key(
        "of an epoch's conversations; 0 trains on none, and only measures",
        default=0.2,
        low=0,
        high=0.9,
    )
    held_out: int = key(
        "conversations held out, and passages of `text`, to measure what is forgotten",
        default=100,
        low=2,
        high=2**31,
    )
    text: str = key("general text to measure on: built-in, or a file", default="speeches")

    def __str__(self) -> str:
        return f"{super().__str__()} (replay)"


@dataclass(frozen=True)
class Stage:
    """One stage of a run: where it starts, what it trains on, and its trainer's settings."""

    name: str  # base, mid or sft
    folder: Path  # <output_dir>/<run>/<stage>, the finished model's folder
    seed: int
    data: list[Source] = key("the sources, as a list: see below")
    held_out: int | float = key(
        "conversations or documents held out for validation; 0 turns validation off",
        defaults={"base": 0.01, "mid": 0.02, "sft": 0.05},
        low=0,
        high=2**31,
        share=True,
    )
    eval_budget: float = key(
        "share of the stage's time that validation may take; 1: always all that is held out",
        default=0.05,
        above=0,
        high=1,
    )
    replay: Replay | None = key(
        "general conversations mixed in, and what is forgotten measured: see below",
        annotation="dict | None",
        stages=LOADING,
        default=None,
    )
    model_name_or_path: str | None = key(
        "the model to start from: an earlier stage of this run, a folder, or a Hub id; in a recipe "
        "with a base and no mid, sft starts from base",
        stages=LOADING,
        default=None,
        defaults={"mid": "base", "sft": "mid"},
        null=False,
        on_resume=SAME,
    )
    revision: str | None = key(
        "a commit, branch or tag of a Hub model", stages=LOADING, default=None
    )
    max_length: int | None = key(
        "tokens of a packed row (base, mid) or of a conversation (sft); "
        "null in base: the model's max_position_embeddings",
        default=None,
        defaults={"mid": 1024, "sft": 1024},
        low=2,
        high=2**20,
    )
    max_steps: int | None = key(
        "optimizer steps; or set `num_train_epochs`. A finished stage can be extended with more",
        default=None,
        defaults={"sft": 200},
        low=1,
        high=2**31,
    )
    tokens_per_parameter: float | None = key(
        "instead of `max_steps`: tokens to train on for each of the model's parameters",
        stages=("base",),
        default=None,
        above=0,
        high=10**6,
    )
    tokens_per_scaling_parameter: float | None = key(
        "instead of `max_steps`: tokens for each parameter but those of an untied embedding; "
        "nanochat's default is 12",
        stages=("base",),
        default=None,
        above=0,
        high=10**6,
    )
    tokens_per_step: int | None = key(
        "tokens of an optimizer step, over all devices; null: one micro-batch a device; "
        "`auto`, in base: by nanochat's rule, from the model's size",
        stages=("base", "mid"),
        default=None,
        auto=True,
        low=2,
        high=2**40,
    )
    examples_per_step: int | None = key(
        "conversations of an optimizer step, over all devices",
        stages=("sft",),
        default=None,
        defaults={"sft": 32},
        null=False,
        low=1,
        high=2**20,
    )
    assistant_only_loss: bool = key(
        "train only on the assistant's tokens and the end of its turn",
        stages=LOADING,
        default=False,
        # mid learns the format from every token
        defaults={"mid": False, "sft": True},
    )
    duplicates: str = key(
        "exact copies of a conversation or document", default="keep", choices=("keep", "drop")
    )
    on_bad_rows: str | None = key(
        "null: an error if more than 1% of a source's rows are bad",
        default=None,
        choices=("error", "skip"),
    )
    on_too_long: str = key(
        "conversations above `max_length`; `split` cuts between exchanges",
        stages=LOADING,
        default="truncate",
        choices=("truncate", "drop", "split", "error"),
    )
    lora: dict | None = key(
        "fields of peft.LoraConfig; the adapter is merged into the saved model",
        stages=LOADING,
        default=None,
    )
    load_in_4bit: bool = key(
        "QLoRA: quantise the model's weights; CUDA only", stages=LOADING, default=False
    )
    muon: dict | None = key("settings of `optim: muon`: see below", default=None)
    attn_implementation: str | None = key(
        "null: transformers' choice, sdpa",
        stages=LOADING,
        default=None,
        choices=ATTENTION,
    )
    dtype: str | None = key(
        "of the loaded weights; null: float32, as mixed precision needs",
        stages=LOADING,
        default=None,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    dataset_num_proc: int | None = key(
        "processes that tokenize the data", default=None, low=1, high=1024, on_resume=FREE
    )
    memory_limit: str | None = key(
        "GPU memory the stage may use, such as 8GB: planned for, and enforced on CUDA",
        default=None,
        on_resume=FREE,
    )
    on_save_error: str = key(
        "if a checkpoint cannot be written; `continue` needs an earlier, complete one",
        default="stop",
        choices=("stop", "continue"),
        on_resume=FREE,
    )
    stop: str | None = key(
        "`plateau`: end the stage once the remaining steps would gain less than 1%",
        default=None,
        choices=("plateau",),
    )
    max_bad_steps: int = key(
        "consecutive steps without a finite loss before the stage stops",
        default=3,
        low=1,
        high=2**31,
        on_resume=FREE,
    )
    push_to_hub: bool = key(
        "push to the Hub during training; the token and its permissions are checked first",
        default=False,
        on_resume=FREE,
    )
    hub_model_id: str | None = key(
        "such as me/fast; null: the run's name under the token's user",
        default=None,
        on_resume=FREE,
    )
    hub_strategy: str = key(
        "what to push; `every_save`: each checkpoint's model, to the branch `checkpoints`",
        default="every_save",
        choices=("end", "every_save", "checkpoint", "all_checkpoints"),
        on_resume=FREE,
    )
    hub_private_repo: bool | None = key(
        "null: the owner's default for new repositories", default=None, on_resume=FREE
    )
    hub_revision: str | None = key(
        "the branch of the finished model; null: main", default=None, on_resume=FREE
    )
    # the rest is no key of a stage's section
    sample_prompts: list[str] = field(default_factory=list)  # answered at every validation
    generation: dict[str, Any] = field(default_factory=dict)  # of generation_config.json
    trainer: dict[str, Any] = field(default_factory=dict)  # upstream's settings, passed through
    plan: dict[str, Any] | None = None  # `Plan.as_data()`, where a plan was made
    chosen: dict[str, Any] = field(default_factory=dict)  # the values of `auto` settings
    trust_remote_code: bool = False
    quiet: bool = False

    @property
    def sources(self) -> list[Source]:
        """Every source that it trains on: `data`, then `replay`."""
        return [*self.data, *([self.replay] if self.replay else [])]

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes: 8GB is 8 * 10^9, 8GiB 8 * 2^30."""
        if self.memory_limit is None:
            return None
        return size_in_bytes(self.memory_limit, f"{self.name}.memory_limit")

    @property
    def validates(self) -> bool:
        """Whether validation runs at all; `eval_steps: -1` and `held_out: 0` turn it off."""
        return self.trainer.get("eval_strategy", "no") != "no" and self.held_out > 0


@dataclass(frozen=True)
class Recipe:
    """A run's recipe, checked."""

    path: str  # as given
    name: str
    output_dir: str
    seed: int
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    sample_prompts: list[str]  # answered at every validation
    generation: dict[str, Any]  # fields of the finished models' generation_config.json
    stages: dict[str, Stage]
    resolved: dict[str, Any]  # the recipe as plain data, defaults and overrides merged in
    arguments: tuple[str, ...] = ()  # the rest of the command line, as given
    restart: bool = False
    quiet: bool = False
    trust_remote_code: bool = False
    ignore_plan: bool = False

    @property
    def folder(self) -> Path:
        """Where everything of this run goes."""
        return Path(self.output_dir) / self.name

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            RecipeError: if the recipe has no such section.
        """
        if name not in self.stages:
            raise RecipeError(
                f"{self.path} has no {name} section; it has {', '.join(self.stages) or 'no stage'}"
            )
        return self.stages[name]

    @property
    def base(self) -> Stage:
        """The base stage."""
        return self.stage("base")

    @property
    def mid(self) -> Stage:
        """The mid stage."""
        return self.stage("mid")

    @property
    def sft(self) -> Stage:
        """The sft stage."""
        return self.stage("sft")


def size_in_bytes(size: str, where: str) -> int:
    """A size such as 8GB (8 * 10^9) or 7.5GiB (7.5 * 2^30) in bytes.

    Args:
        size: as written.
        where: the place to name in the error.

    Raises:
        RecipeError: if it is not a size, or zero.
    """
    match = MEMORY.fullmatch(size)
    if match is None or not re.search("[1-9]", size):
        raise RecipeError(f"{where}: expected a size such as 8GB or 7.5GiB, got {quoted(size)}")
    number, unit = match.groups()
    power = "KMGT".index(unit[0]) + 1
    return int(float(number) * (1024 if "i" in unit else 1000) ** power)


STAGE_FIELDS = {item.name for item in dataclass_fields(Stage)} - {"trainer"}
