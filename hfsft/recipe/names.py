"""Names: the command line's aliases and flags, other tools' names, and keys that are refused."""

# the reference pipeline's flags, accepted on the command line
ALIASES = {
    "device_batch_size": "per_device_train_batch_size",
    "target_examples_per_step": "examples_per_step",
    "max_tokens": "max_length",
    "num_iterations": "max_steps",
    "eval_every": "eval_steps",
}


# accepted on the command line but never in a recipe: name → what it does
FLAGS = {
    "restart": "start the stage over; its old folder is moved aside, not deleted",
    "quiet": "print errors only",
    "trust_remote_code": "run the Python code in a model's repository",
    "ignore_plan": "start a stage even if it should not fit into memory or on the disk",
}


# transformers' deprecated names, which most recipes still use: old → new
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


# other tools' names for a key, for hints: theirs → ours
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


# upstream's keys that a stage's section does not take: key → why, and what to do instead
REFUSED = {
    "output_dir": (
        "it belongs at the top of the recipe: everything goes to <output_dir>/<name>/<stage>/"
    ),
    "seed": "it belongs at the top of the recipe",
    "data_seed": "the top-level seed also orders the data",
    "run_name": "the top-level name names the run",
    "gradient_accumulation_steps": (
        "it follows from examples_per_step (sft) or tokens_per_step (base, mid)"
    ),
    "auto_find_batch_size": "it would silently change which examples share a step",
    "packing": "it would change which conversations share a step",
    "padding_free": "it would change which conversations share a step",
    "pad_to_multiple_of": "a row is as long as the step's conversations need",
    "eval_packing": "validation packs its documents without changing their losses",
    "save_only_model": "training could not resume from such a checkpoint",
    "ignore_data_skip": "a resumed run would see different examples",
    "resume_from_checkpoint": (
        "the same command resumes from its last checkpoint; --restart starts over"
    ),
    "hub_token": "tokens are stored in no file: run `hf auth login`, or set HF_TOKEN",
    "eval_on_start": "eval_steps controls validation before, during and after training (-1: none)",
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
    "completion_only_loss": (
        "of a prompt and its completion the completion alone is trained on; with "
        "assistant_only_loss: false also the prompt's system and user messages"
    ),
    "chat_template_path": "use tokenizer: {chat_template: FILE}",
    "eos_token": "the chat template's end-of-turn token ends an answer",
    "pad_token": "the tokenizer's own pad token is used, or one is added",
    "remove_unused_columns": MANAGED,
    "train_sampling_strategy": "the seed decides the order of the examples",
    "hub_always_push": "pushes run one after another beside training; the rest at the end",
    "disable_tqdm": MANAGED,
    "include_num_input_tokens_seen": MANAGED,
    "logging_nan_inf_filter": "it would replace a NaN loss in the log by the mean of earlier ones",
}


# fields of LoraConfig that describe the adapter that peft saves, and are no settings
REFUSED_LORA = (
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "peft_version",
)
