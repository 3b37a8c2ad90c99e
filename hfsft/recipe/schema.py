"""The keys of a recipe: which section has them, what they may hold, why some are refused."""

import re
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, quoted
from hfsft.recipe.upstream import Field, trainer_fields

STAGES = ("base", "mid", "sft")


# the reference pipeline's flags, accepted on the command line
ALIASES = {
    "device_batch_size": "per_device_train_batch_size",
    "target_examples_per_step": "examples_per_step",
    "max_tokens": "max_length",
    "num_iterations": "max_steps",
    "eval_every": "eval_steps",
}


# what only the command line may say, and never a recipe: name → what it does
FLAGS = {
    "restart": "begin the stage anew; its old folder is moved aside, not deleted",
    "quiet": "print errors only",
    "trust_remote_code": "run the Python code that a model's repository brings",
    "ignore_plan": "start a stage that by its plan does not fit into memory",
}


# the keys of a stage that may be `auto`: its plan settles them
AUTO = "auto"


AUTO_KEYS = (
    "per_device_train_batch_size",
    "activation_checkpointing",
    "gradient_checkpointing",
    "optim",
)


# transformers' old names for the same fields, still taken by everyone: old → new
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


# what other tools call it → what it is here
OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "dataset": "data",
    "datasets": "data",
}


MANAGED = "hfsft sets it"


REFUSED = {
    "output_dir": (
        "it belongs at the top of the recipe: everything goes to <output_dir>/<name>/<stage>/"
    ),
    "seed": "it belongs at the top of the recipe",
    "data_seed": "the top-level seed orders the data",
    "run_name": "the top-level name names the run",
    "gradient_accumulation_steps": (
        "it follows from examples_per_step (sft) or tokens_per_step (base, mid)"
    ),
    "auto_find_batch_size": "it changes the examples of a step unasked",
    "packing": "it would change which conversations share a step",
    "padding_free": "it would change which conversations share a step",
    "eval_packing": "validation is never packed",
    "save_only_model": "a run could not go on from such a checkpoint",
    "ignore_data_skip": "a run that goes on would see other examples",
    "resume_from_checkpoint": (
        "the same command goes on by itself where it stopped; --restart begins anew"
    ),
    "hub_token": "tokens are kept in no file: run `hf auth login`, or set HF_TOKEN",
    "eval_on_start": "validation before, during and after training is set by eval_steps (-1: none)",
    "do_train": MANAGED,
    "do_eval": MANAGED,
    "do_predict": MANAGED,
    "local_rank": "Accelerate sets it",
    "deepspeed": "choose it with `accelerate launch --config_file accelerate_configs/zero2.yaml`",
    "fsdp": "choose it with `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "fsdp_config": "choose it with `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "parallelism_config": "choose it with an Accelerate config file",
    "model_init_kwargs": "use attn_implementation, dtype and revision of this section",
    "dataset_kwargs": MANAGED,
    "dataset_text_field": "give the source `columns: {text: YOUR_COLUMN}`",
    "formatting_func": "give the source a `format`",
    "completion_only_loss": "use assistant_only_loss",
    "chat_template_path": "use tokenizer: {chat_template: FILE}",
    "eos_token": "the chat template's end-of-turn token ends an answer",
    "pad_token": "the tokenizer's own pad token is used, or one is added",
    "remove_unused_columns": MANAGED,
    "train_sampling_strategy": "steps are made of examples in seeded order",
    "hub_always_push": "no push waits for another; what is still to be sent is sent at the end",
    "disable_tqdm": MANAGED,
    "include_num_input_tokens_seen": MANAGED,
    "logging_nan_inf_filter": "it would log a NaN as the mean of the losses before",
}


# of peft's adapter_config.json, and no settings
REFUSED_LORA = (
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "peft_version",
)


# the values that make sense, by key in whatever section: lowest, highest
LIMITS: dict[str, tuple[float, float]] = {
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_epsilon": (0, 1),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 2**16),
    "dataset_num_proc": (1, 1024),
    "depth": (1, 128),
    "eval_accumulation_steps": (1, 2**31),
    "eval_delay": (0, 2**31),
    "examples_per_step": (1, 2**20),
    "eval_budget": (0, 1),
    "held_out": (0, 2**31),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "label_smoothing_factor": (0, 1),
    "learning_rate": (0, 1000),
    "logging_steps": (0, 2**31),
    "lora_alpha": (1, 2**16),
    "lora_dropout": (0, 1),
    "max_bad_steps": (1, 2**31),
    "max_chars": (1, 2**40),
    "max_grad_norm": (0, 10**9),
    "max_length": (2, 2**20),
    "max_position_embeddings": (2, 2**24),
    "max_steps": (1, 2**31),
    "neftune_noise_alpha": (0, 1000),
    "num_attention_heads": (1, 2**16),
    "num_hidden_layers": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "num_train_epochs": (0, 2**16),
    "pad_to_multiple_of": (1, 2**20),
    "per_device_eval_batch_size": (1, 2**16),
    "per_device_train_batch_size": (1, 2**16),
    "r": (1, 2**16),
    "repeat": (1, 1000),
    "rows": (1, 2**40),
    "save_steps": (0, 2**31),
    "save_total_limit": (1, 2**16),
    "seed": (0, 2**32 - 1),
    "tokens_per_step": (2, 2**40),
    "torch_empty_cache_steps": (1, 2**31),
    "vocab_size": (266, 2**20),
    "warmup_steps": (0, 2**31),
    "weight": (0, 1000),
    "weight_decay": (0, 1000),
}


ABOVE_ZERO = {
    "eval_budget",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "weight",
}


# below 1 a share of the whole, else a number of steps or conversations
SHARES = {"eval_steps", "held_out", "logging_steps", "save_steps", "warmup_steps"}


MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)")


TOP_KEYS = ("name", "output_dir", "seed", "model", "tokenizer", "sample_prompts", *STAGES)


# where a stage's result goes
HUB_KEYS = (
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_revision",
)


# the keys of a stage's section that are hfsft's own, or that it reads itself
_ALL_STAGES = (
    "data",
    "held_out",
    "eval_budget",
    "stop",
    "duplicates",
    "on_bad_rows",
    "max_length",
    "max_steps",
    "dataset_num_proc",
    "memory_limit",
    "on_save_error",
    "max_bad_steps",
    *HUB_KEYS,
)


_LOADS_A_MODEL = (
    "model_name_or_path",
    "revision",
    "assistant_only_loss",
    "lora",
    "load_in_4bit",
    "dtype",
    "attn_implementation",
    "on_too_long",
)


STAGE_KEYS = {
    "base": (*_ALL_STAGES, "tokens_per_step"),
    "mid": (*_ALL_STAGES, *_LOADS_A_MODEL, "tokens_per_step"),
    "sft": (*_ALL_STAGES, *_LOADS_A_MODEL, "examples_per_step"),
}


FORMATS = (
    "text",
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "multiple_choice",
    "gsm8k",
)


FIELDS = {
    "name": Field("str"),
    "output_dir": Field("str"),
    "seed": Field("int"),
    "extends": Field("str"),
    "data": Field("list"),
    "held_out": Field("int | float"),
    "eval_budget": Field("float"),
    "stop": Field("str | None", ("plateau",)),
    "model_name_or_path": Field("str"),
    "revision": Field("str | None"),
    "max_length": Field("int | None"),
    "max_steps": Field("int | None"),
    "tokens_per_step": Field("int | None"),
    "dataset_num_proc": Field("int | None"),
    "memory_limit": Field("str | None"),
    "sample_prompts": Field("list"),
    "examples_per_step": Field("int"),
    "assistant_only_loss": Field("bool"),
    "lora": Field("dict | None"),
    "load_in_4bit": Field("bool"),
    "dtype": Field("str | None", ("auto", "float32", "bfloat16", "float16")),
    "attn_implementation": Field(
        "str | None",
        ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
    ),
    "path": Field("str"),
    "split": Field("str"),
    "rows": Field("int | None"),
    "first": Field("bool"),
    "repeat": Field("int"),
    "weight": Field("float"),
    "duplicates": Field("str", ("keep", "drop")),
    "on_bad_rows": Field("str | None", ("error", "skip")),
    "on_save_error": Field("str", ("stop", "continue")),
    "max_bad_steps": Field("int"),
    "push_to_hub": Field("bool"),
    "hub_model_id": Field("str | None"),
    "hub_strategy": Field("str", ("end", "every_save", "checkpoint", "all_checkpoints")),
    "hub_private_repo": Field("bool | None"),
    "hub_revision": Field("str | None"),
    "on_too_long": Field("str", ("truncate", "drop", "split", "error")),
    "streaming": Field("bool"),
    "columns": Field("dict"),
    "format": Field("str | None", FORMATS),
    "train": Field("bool"),
    "chat_template": Field("str"),
    "max_chars": Field("int"),
    "model_type": Field("str"),
    "depth": Field("int"),
    "vocab_size": Field("int"),
    "max_position_embeddings": Field("int"),
    # trl takes any text here and fails, or trains otherwise than meant, much later
    "loss_type": Field("str", ("nll", "dft")),
    "truncation_mode": Field("str", ("keep_start", "keep_end")),
    "lr_scheduler_kwargs": Field("dict | None"),
    "activation_checkpointing_kwargs": Field("dict | None"),
    "gradient_checkpointing_kwargs": Field("dict | None"),
}


TOKENIZER_KEYS = ("train", "path", "revision", "vocab_size", "chat_template", "max_chars")


MODEL_KEYS = ("depth", "vocab_size", "max_position_embeddings", "model_type", "attn_implementation")


def stage_fields(stage: str) -> dict[str, Field]:
    """Every key that a stage's section takes."""
    own = {key: FIELDS[key] for key in STAGE_KEYS[stage]}
    upstream = {
        key: FIELDS.get(key, known)
        for key, known in trainer_fields(stage).items()
        if key not in REFUSED
    }
    return upstream | own


@dataclass(frozen=True)
class Source:
    """One source of rows in a stage's `data`."""

    path: str  # a built-in task, a local file, folder or glob, or a dataset on the Hub
    name: str | None = None  # the dataset's configuration, such as ARC-Easy
    split: str = "train"
    revision: str | None = None  # a commit, branch or tag of a Hub dataset
    rows: int | None = None  # keep a seeded sample of this many rows
    first: bool = False  # take the first rows instead of a sample
    repeat: int = 1  # how often the kept rows are seen an epoch
    weight: float = 1.0  # scales that: 0.5 sees half of them, 2.5 all twice and half once more
    seed: int | None = None  # of the sample, or of a task's rows; None: the recipe's
    streaming: bool = False  # read while training instead of before; base text only
    columns: dict = field(default_factory=dict)  # the format's column: the row's own column
    format: str | None = None  # messages, sharegpt, ... ; None: told from the columns

    @property
    def copies(self) -> float:
        """How often an epoch sees each kept row."""
        return self.repeat * self.weight

    def __str__(self) -> str:
        return self.path + (f":{self.name}" if self.name else "")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: where it starts, what it learns from, and the settings of its trainer."""

    name: str  # base, mid or sft
    folder: Path  # <output_dir>/<run>/<stage>, the finished model's folder
    seed: int
    data: list[Source]
    held_out: int | float  # conversations or documents kept for validation; below 1 a share
    eval_budget: float = 0.05  # share of the stage's time that validation may take
    model_name_or_path: str | None = None  # mid, sft: an earlier stage, a folder or a Hub id
    revision: str | None = None
    max_length: int | None = None  # tokens of a conversation (sft) or of a packed row (base, mid)
    max_steps: int | None = None  # optimizer updates
    tokens_per_step: int | None = None  # base, mid
    examples_per_step: int | None = None  # sft: conversations an update
    assistant_only_loss: bool = False
    duplicates: str = "keep"  # exact copies of a conversation or document: keep or drop
    on_bad_rows: str | None = None  # error or skip; None: error above 1% of a source
    on_too_long: str = "truncate"  # conversations above max_length: truncate, drop, split, error
    lora: dict | None = None  # fields of peft.LoraConfig
    load_in_4bit: bool = False  # QLoRA
    attn_implementation: str | None = None  # None: what transformers chooses, sdpa
    dtype: str | None = None  # of the loaded weights; None: float32, as mixed precision wants
    dataset_num_proc: int | None = None  # processes that encode the data
    memory_limit: str | None = None  # such as 8GB; GPU memory that the stage may take
    on_save_error: str = "stop"  # stop or continue, where an earlier checkpoint is whole
    stop: str | None = None  # plateau: end the stage where validation says that no more is to gain
    max_bad_steps: int = 3  # steps in a row with a loss that is no finite number, before it stops
    push_to_hub: bool = False
    hub_model_id: str | None = None  # such as me/fast; None: the run's name, of the token's user
    hub_strategy: str = "every_save"  # end, every_save, checkpoint, all_checkpoints; see push.py
    hub_private_repo: bool | None = None  # None: as the owner's new repositories are
    hub_revision: str | None = None  # the finished model's branch; None: main
    sample_prompts: list[str] = field(default_factory=list)  # answered at every validation
    trainer: dict[str, Any] = field(default_factory=dict)  # passed through as it is
    plan: dict[str, Any] | None = None  # as `memory.Plan.as_data`, where one was made
    chosen: dict[str, Any] = field(default_factory=dict)  # the values of `auto` settings
    trust_remote_code: bool = False
    quiet: bool = False

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
        """Whether any validation runs: `eval_steps: -1` or `held_out: 0` turn it off altogether."""
        return self.trainer.get("eval_strategy", "no") != "no" and self.held_out > 0


@dataclass(frozen=True)
class Recipe:
    """A whole run, checked."""

    path: str  # as given
    name: str
    output_dir: str
    seed: int
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    sample_prompts: list[str]  # what the finished model is asked
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
        RecipeError: if it is none, or zero.
    """
    match = MEMORY.fullmatch(size)
    if match is None or not re.search("[1-9]", size):
        raise RecipeError(f"{where}: expected a size such as 8GB or 7.5GiB, got {quoted(size)}")
    number, unit = match.groups()
    power = "KMGT".index(unit[0]) + 1
    return int(float(number) * (1024 if "i" in unit else 1000) ** power)


STAGE_FIELDS = {item.name for item in dataclass_fields(Stage)} - {"trainer"}
