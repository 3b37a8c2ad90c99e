"""The keys of each section: the top level, model, tokenizer, sources, stages and LoRA.

A stage's own keys are the fields of `Stage`, a source's those of `Source`. `UPSTREAM`,
`MODEL_CONFIG` and `LORA` hold what hfsft adds to keys of transformers, trl and peft: bounds,
defaults, and whether they may change on resume. Upstream's other keys need no entry here.
"""

from dataclasses import replace
from typing import Any

from hfsft.recipe.key import FIXED, FREE, ROUNDED, STAGES, UNSET, Key, declared_keys, overlaid
from hfsft.recipe.names import REFUSED, RENAMED
from hfsft.recipe.schema import ATTENTION, DEFAULT_PRE_TOKENIZER, MUON, Replay, Source, Stage
from hfsft.recipe.upstream import Field, lora_fields, model_fields, trainer_fields

# of a mapping: whether it may change on resume depends on the key inside it
BY_KEY = "key by key"


EXTENDS = Key("str", help="another recipe, built in or a file beside this one", on_resume=BY_KEY)


TOP = {
    "name": Key("str", help="another name is another run; without it the file's name"),
    "output_dir": Key("str", help="the run's files go to `<output_dir>/<name>/`", default="runs"),
    "seed": Key(
        "int",
        help="of the weights, the order of the data, and samples",
        default=42,
        low=0,
        high=2**32 - 1,
    ),
    "model": Key("dict | None", help="the model that base builds: see below"),
    "tokenizer": Key(
        "dict | str | None", help="see below; text is short for its `path`", default={}
    ),
    "sample_prompts": Key(
        "list",
        help="prompts that the model answers at every validation",
        default=["Who are you?", "What is the capital of France?", "Why is the sky blue?"],
        on_resume=FREE,
    ),
    "generation": Key(
        "dict | None",
        help="how the finished models want to be sampled: see below",
        default={},
        on_resume=FREE,
    ),
    "base": Key("dict | None", help="the base stage: see below", on_resume=BY_KEY),
    "mid": Key("dict | None", help="the mid stage: see below", on_resume=BY_KEY),
    "sft": Key("dict | None", help="the sft stage: see below", on_resume=BY_KEY),
}


MODEL = {
    "depth": Key(
        "int", help="a NanoChat model of this depth, with hidden size 64 * depth", low=1, high=128
    ),
    "vocab_size": Key("int", help="tokens of the vocabulary", low=266, high=2**20),
    "max_position_embeddings": Key("int", help="the longest context", low=2, high=2**24),
    "model_type": Key("str", help="instead of depth: any of transformers', with its config's keys"),
    "attn_implementation": Key(
        "str | None", ATTENTION, help="null: transformers' choice, sdpa", default=None
    ),
}


# of a NanoChat model that `depth` shapes
DEPTH = {
    "final_logit_softcapping": Key(
        "float | None",
        help="logits become x * tanh(logits / x), in nanochat with 15; null: unchanged, as every "
        "reader of an exported model computes them",
        default=None,
        above=0,
        high=10**6,
    ),
}


# of a model's configuration, where `model_type` is given
MODEL_CONFIG = {
    "hidden_size": Key(help="width of the residual stream", low=1, high=2**20),
    "intermediate_size": Key(help="width of the MLP", low=1, high=2**24),
    "num_hidden_layers": Key(help="layers", low=1, high=2**16),
    "num_attention_heads": Key(help="query heads", low=1, high=2**16),
    "num_key_value_heads": Key(help="key and value heads", low=1, high=2**16),
}


TOKENIZER = {
    "train": Key("bool", help="train a tokenizer on the base stage's text", default=False),
    "path": Key("str", help="instead of training: a folder or a Hub id"),
    "revision": Key("str | None", help="a commit, branch or tag of `path`", default=None),
    "vocab_size": Key(
        "int", help="of a trained tokenizer; without it the model's", low=266, high=2**20
    ),
    "chat_template": Key(
        "str", help="`nanochat`, `chatml` or a Jinja file; without it the tokenizer's own"
    ),
    "pre_tokenizer": Key(
        "str",
        ("qwen2", "llama-bpe", "nanochat"),
        help="how a trained tokenizer splits text into words: as Qwen2's (each digit alone) or "
        "Llama 3's (up to three), which llama.cpp knows, or nanochat's (up to two), which it does "
        "not",
        default=DEFAULT_PRE_TOKENIZER,
    ),
    "max_chars": Key(
        "int", help="characters of text to train on", default=200_000_000, low=1, high=2**40
    ),
}


# of transformers.GenerationConfig. The end tokens are the tokenizer's
GENERATION = {
    "do_sample": Key(
        "bool",
        help="sample; if false, pipelines and `transformers serve` are greedy at any temperature",
        default=True,
    ),
    "temperature": Key("float", help="divides the logits", default=0.6, above=0, high=100),
    "top_k": Key(
        "int",
        help="sample from this many of the most probable tokens",
        default=50,
        low=0,
        high=2**20,
    ),
    "top_p": Key(
        "float", help="sample from the tokens that share this probability", above=0, high=1
    ),
    "min_p": Key("float", help="least probability, as a share of the top-1 token's", low=0, high=1),
    "repetition_penalty": Key("float", help="above 1 discourages repetition", above=0, high=100),
    "no_repeat_ngram_size": Key("int", help="no n-gram of this size twice", low=0, high=2**16),
    "max_new_tokens": Key(
        "int",
        help="tokens of an answer at most; without it half of the context, at most 1,024",
        low=1,
        high=2**24,
    ),
}


LORA = {
    "r": Key(help="the adapter's rank", low=1, high=2**16),
    "lora_alpha": Key(help="the adapter is scaled by lora_alpha / r", low=1, high=2**16),
    "lora_dropout": Key(help="dropout of the adapter's input", low=0, high=1),
}


# `optim: muon`; AdamW trains what is no matrix of a block, with `learning_rate`, `adam_beta1`, ...
MUON_SETTINGS = {
    "learning_rate": Key("float", help="of the blocks' matrices", default=0.02, above=0, high=1000),
    "embedding_learning_rate": Key(
        "float | None",
        help="of an untied token embedding; null: the stage's `learning_rate`",
        default=None,
        above=0,
        high=1000,
    ),
    "scale_by_width": Key(
        "bool",
        help="multiply AdamW's learning rates by (hidden_size / 768)^-0.5, as nanochat does",
        default=False,
    ),
    "weight_decay": Key(
        "float | None",
        help="of the blocks' matrices; null: the stage's `weight_decay`",
        default=None,
        low=0,
        high=1000,
    ),
    "momentum": Key("float", help="after its warm-up", default=0.95, low=0, high=0.999999),
    "momentum_start": Key(
        "float", help="the momentum of the first update", default=0.85, low=0, high=0.999999
    ),
    "momentum_warmup_steps": Key(
        "int", help="updates until the momentum is reached", default=300, low=0, high=2**31
    ),
    "adjust_lr_fn": Key(
        "str",
        ("original", "match_rms_adamw"),
        help="torch's: `original` multiplies a matrix's learning rate by "
        "max(1, rows / columns)^0.5, `match_rms_adamw` by 0.2 * max(rows, columns)^0.5, for "
        "learning rates of AdamW's size",
        default="original",
    ),
}


# of TrainingArguments and, in sft, trl.SFTConfig
UPSTREAM = {
    "per_device_train_batch_size": Key(
        help="rows of a micro-batch; a step holds the same examples whatever it is",
        defaults={"base": 8, "mid": 8, "sft": 2},
        low=1,
        high=2**16,
        auto=True,
        on_resume=ROUNDED,
    ),
    "per_device_eval_batch_size": Key(
        help="rows of a validation batch", low=1, high=2**16, on_resume=FREE
    ),
    "num_train_epochs": Key(help="instead of `max_steps`", above=0, high=2**16),
    "learning_rate": Key(
        help="the schedule's peak",
        defaults={"base": 1e-3, "mid": 3e-4, "sft": 2e-5},
        above=0,
        high=1000,
    ),
    "lr_scheduler_type": Key(
        help="the learning-rate schedule",
        defaults={"base": "cosine", "mid": "linear", "sft": "linear"},
    ),
    "lr_scheduler_kwargs": Key("dict | None", help="the schedule's arguments"),
    "warmup_steps": Key(
        help="warm-up, in steps or as a share of them",
        defaults={"base": 0.02, "mid": 0.02},
        low=0,
        high=2**31,
        share=True,
    ),
    "weight_decay": Key(help="of the optimizer", defaults={"base": 0.1}, low=0, high=1000),
    "optim": Key(
        help="the optimizer; `muon`: Muon for the blocks' matrices, AdamW for the rest",
        defaults={"base": "adamw_torch_fused", "mid": "adamw_torch_fused", "sft": "adamw_bnb_8bit"},
        auto=True,
        added=(MUON,),
    ),
    "adam_beta1": Key(help="decay of AdamW's first moment", low=0, high=0.999999),
    "adam_beta2": Key(help="decay of AdamW's second moment", low=0, high=0.999999),
    "adam_epsilon": Key(help="added to AdamW's denominator", low=0, high=1),
    "max_grad_norm": Key(help="gradients are clipped to this norm", low=0, high=10**9),
    "label_smoothing_factor": Key(help="label smoothing of the cross-entropy", low=0, high=1),
    "neftune_noise_alpha": Key(help="noise added to the embeddings", low=0, high=1000),
    # trl accepts any text for these, and fails late or trains on something else
    "loss_type": Key("str", ("nll", "dft"), help="cross-entropy, or dynamic fine-tuning"),
    "truncation_mode": Key(
        "str",
        ("keep_start",),
        help="a conversation's beginning is kept; trl's `keep_end` is not here",
    ),
    "gradient_checkpointing": Key(
        help="recompute activations in the backward pass: less memory, more time",
        defaults={"sft": True},
        auto=True,
        on_resume=FREE,  # recomputed activations have the same bits
    ),
    "gradient_checkpointing_kwargs": Key(
        "dict | None", help="the arguments of torch.utils.checkpoint"
    ),
    "eval_strategy": Key(help="when to validate", defaults=dict.fromkeys(STAGES, "steps")),
    "eval_steps": Key(
        help="steps between validations, or a share of all steps; -1 turns validation off",
        defaults=dict.fromkeys(STAGES, 0.25),
        share=True,
    ),
    "eval_delay": Key(help="steps or epochs before the first validation", low=0, high=2**31),
    "eval_accumulation_steps": Key(
        help="validation batches before results move to the CPU", low=1, high=2**31
    ),
    "logging_strategy": Key(help="when to log", on_resume=FREE),
    "logging_steps": Key(
        help="steps between log lines, or a share of all steps",
        defaults=dict.fromkeys(STAGES, 10),
        above=0,
        high=2**31,
        share=True,
        on_resume=FREE,
    ),
    "logging_first_step": Key(help="log the first step too", on_resume=FREE),
    "save_strategy": Key(
        help="when to save a checkpoint",
        defaults=dict.fromkeys(STAGES, "steps"),
        on_resume=FREE,
    ),
    "save_steps": Key(
        help="steps between checkpoints, or a share of all steps",
        defaults=dict.fromkeys(STAGES, 0.25),
        above=0,
        high=2**31,
        share=True,
        on_resume=FREE,
    ),
    "save_total_limit": Key(
        help="checkpoints kept",
        defaults=dict.fromkeys(STAGES, 2),
        low=1,
        high=2**16,
        on_resume=FREE,
    ),
    "report_to": Key(help="`tensorboard`, `trackio`, `wandb`: log there as well", on_resume=FREE),
    "log_level": Key(help="of transformers, on the main process", on_resume=FREE),
    "log_level_replica": Key(help="the same on the other processes", on_resume=FREE),
    "log_on_each_node": Key(help="log on every node instead of the first alone", on_resume=FREE),
    "dataloader_num_workers": Key(
        help="processes that prepare batches", low=0, high=1024, on_resume=FREE
    ),
    "dataloader_prefetch_factor": Key(
        help="batches that each process prepares ahead", low=1, high=2**16, on_resume=FREE
    ),
    "dataloader_persistent_workers": Key(
        help="keep these processes between epochs", on_resume=FREE
    ),
    "dataloader_pin_memory": Key(help="page-locked batches, which copy faster", on_resume=FREE),
    "ddp_timeout": Key(help="seconds a rank waits for the others", on_resume=FREE),
    "torch_empty_cache_steps": Key(
        help="steps between emptying the GPU's cache", low=1, high=2**31, on_resume=FREE
    ),
}
for _old, _new in RENAMED.items():
    UPSTREAM[_new] = replace(UPSTREAM[_old], help=f"the new name of `{_old}`", defaults={})


def stage_keys(stage: str) -> dict[str, Key]:
    """The keys of a stage's section that hfsft declares: its own, then upstream's."""
    own = {name: one for name, one in declared_keys(Stage).items() if stage in one.stages}
    upstream = {
        name: UPSTREAM[name].typed_by(known)
        for name, known in trainer_fields(stage).items()
        if name in UPSTREAM
    }
    return own | {name: upstream[name] for name in UPSTREAM if name in upstream}


def stage_fields(stage: str) -> dict[str, Field]:
    """Every key that a stage's section takes, those that are passed through included."""
    allowed = {key: known for key, known in trainer_fields(stage).items() if key not in REFUSED}
    return allowed | stage_keys(stage)


def source_fields() -> dict[str, Key]:
    """Every key of a source."""
    return declared_keys(Source)


def replay_fields() -> dict[str, Key]:
    """Every key of a `replay` section; how often its rows are seen follows from its share."""
    left_out = ("repeat", "weight", "streaming")
    return {name: one for name, one in declared_keys(Replay).items() if name not in left_out}


def model_section(model_type: str | None) -> dict[str, Field]:
    """Every key of the `model` section; without a `model_type`, those of a NanoChat model."""
    if not model_type:
        return MODEL | DEPTH
    return overlaid(model_fields(model_type), MODEL_CONFIG) | MODEL


def lora_section() -> dict[str, Field]:
    """Every key of a `lora` section."""
    return overlaid(lora_fields(), LORA)


def top_defaults() -> dict[str, Any]:
    """The values that the top level of every recipe starts from."""
    return {name: one.default for name, one in TOP.items() if one.default is not UNSET}


def stage_defaults(stage: str) -> dict[str, Any]:
    """The values that a stage's section starts from."""
    keys = declared_keys(Stage) | UPSTREAM
    return {name: one.defaults[stage] for name, one in keys.items() if stage in one.defaults}


def on_resume(key: str) -> str:
    """Whether a key of a stage may change when the stage resumes: `FIXED`, `FREE` or `ROUNDED`."""
    declared = (declared_keys(Stage) | UPSTREAM).get(key)
    return FIXED if declared is None else declared.on_resume
