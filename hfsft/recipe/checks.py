"""Check a recipe's keys and values: key by key, and then the rules that span several keys."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, nearest, quoted
from hfsft.recipe.key import AUTO, STAGES, Key
from hfsft.recipe.names import (
    ALIASES,
    FLAGS,
    MANAGED,
    OTHER_NAMES,
    REFUSED,
    REFUSED_LORA,
    RENAMED,
)
from hfsft.recipe.schema import MUON, PER_PARAMETER, Replay, Source, size_in_bytes
from hfsft.recipe.sections import (
    MODEL,
    MUON_SETTINGS,
    TOP,
    lora_section,
    model_section,
    replay_fields,
    source_fields,
    stage_fields,
)
from hfsft.recipe.upstream import Field, model_fields, model_types
from hfsft.recipe.yaml_nodes import Node, kind

# the place of a value that no file or flag set
DEFAULTS = "hfsft's defaults"


def is_default(node: Node) -> bool:
    """Whether a value comes from hfsft's defaults."""
    return node.where == DEFAULTS


# --- one key ---


def check_value(key: str, node: Node, known: Field) -> Any:
    """Return one value as its key takes it.

    Args:
        key: its dotted path, for the error.
        node: the value.
        known: the key's declaration, or upstream's field.

    Raises:
        RecipeError: if the key does not take the value.
    """
    try:
        return known.check(node.plain(), node.raw)
    except ValueError as error:
        raise RecipeError(f"{node.where}: {key}: {error}") from None


def check_section(node: Node, section: str, known: dict[str, Field]) -> dict[str, Any]:
    """Check a mapping's keys and values; returns it as plain data."""
    if node.value is None:
        node.value = {}
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {section}: expected a mapping, got {kind(node)}")
    refuse_unknown(node, section, known)
    checked = {}
    for key, child in node.value.items():
        full = f"{section}.{key}" if section else key
        checked[key] = check_value(full, child, known[key])
        if not isinstance(child.value, (dict, list)):
            child.value = checked[key]  # the run's copy of the recipe holds the checked value
    return checked


def refuse_unknown(node: Node, section: str, known: Collection[str]) -> None:
    """Raise a `RecipeError` for the first unknown key, with a hint at the one that was meant."""
    for key, child in node.value.items():
        full = f"{section}.{key}" if section else key
        if key == "trust_remote_code":
            raise RecipeError(
                f"{child.where}: {full}: can only be set on the command line "
                "(--trust_remote_code), so that no recipe runs code on its own"
            )
        if key in known:
            continue
        if key in REFUSED and section in ("", *STAGES):
            raise RecipeError(f"{child.where}: {full} cannot be set: {REFUSED[key]}")
        if key in REFUSED_LORA and section.endswith(".lora"):
            raise RecipeError(f"{child.where}: {full} cannot be set: {MANAGED}")
        place = f" in {section}" if section else ""
        # a flag without a section may have been meant for the top, or as one of `FLAGS`
        is_flag = section in STAGES and child.where == f"--{key}"
        meant = [*known, *TOP, *FLAGS] if is_flag else known
        raise RecipeError(
            f"{child.where}: unknown key {quoted(key)}{place}{_hint(key, section, meant)}"
        )


def _hint(key: str, section: str, known: Collection[str]) -> str:
    """A hint for an unknown key: its name here, the section it belongs in, or the nearest key."""
    if key in ALIASES and ALIASES[key] in known:
        return f"; its name in a recipe is '{ALIASES[key]}'"
    if key in FLAGS:
        return f"; it is a command-line flag (--{key})"
    if section and key in (*TOP, "extends"):
        return "; it belongs at the top of the recipe"
    if not section or section in STAGES:
        name = ALIASES.get(key, key)
        homes = [stage for stage in STAGES if name in stage_fields(stage)]
        if homes and not section:
            return f"; it belongs in a stage's section ({', '.join(homes)})"
        if homes:
            return f"; it belongs in {' or '.join(homes)}"
    nearest_key = near(key, known)
    if nearest_key or len(known) < 15:
        return nearest_key or f"; known keys are {', '.join(sorted(known))}"
    upstream = "TrainingArguments" if section in ("base", "mid") else "trl.SFTConfig"
    upstream = "peft.LoraConfig" if section.endswith(".lora") else upstream
    return "" if section == "model" else f"; neither hfsft nor {upstream} has it"


def near(key: str, known: Collection[str]) -> str:
    """The end of an error message: the key that was meant, or the nearest."""
    meant = OTHER_NAMES.get(key)
    return f"; did you mean '{meant}'?" if meant in known else nearest(key, known)


# --- sections outside a stage ---


def check_name(node: Node, name: str) -> None:
    """Refuse a run's name that cannot be the name of a folder."""
    one_part = name not in (".", "..") and Path(name).name == name
    # file systems allow 255 bytes; a folder moved aside gets a suffix such as .old-1
    if not (one_part and name.isprintable() and name == name.strip() and len(name.encode()) < 200):
        raise RecipeError(f"{node.where}: name: {quoted(name)} is not a valid folder name")


def check_sample_prompts(node: Node) -> None:
    """Refuse a sample prompt that is not text."""
    for index, prompt in enumerate(node.value):
        if not isinstance(prompt.value, str):
            raise RecipeError(
                f"{prompt.where}: sample_prompts.{index}: expected text, got {kind(prompt)}"
            )


def check_model(node: Node) -> dict[str, Any]:
    """Check the `model` section; returns it as plain data."""
    model_type = None
    if isinstance(node.value, dict) and "model_type" in node.value:
        child = node.value["model_type"]
        model_type = check_value("model.model_type", child, MODEL["model_type"])
        if not model_fields(model_type):
            raise RecipeError(
                f"{child.where}: model.model_type: transformers has no model type '{model_type}'"
                f"{nearest(model_type, model_types())}"
            )
        if "depth" in node.value:
            raise RecipeError(
                f"{node.value['depth'].where}: model.depth: model_type is given as well "
                f"({child.where}); choose one"
            )
    return check_section(node, "model", model_section(model_type))


def check_tokenizer(node: Node, model: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Refuse tokenizer keys that exclude each other."""

    def refuse(key: str, problem: str) -> None:
        raise RecipeError(f"{node.value[key].where}: tokenizer.{key}: {problem}")

    if tokenizer.get("train"):
        for key in ("path", "revision"):
            if key in tokenizer:
                refuse(key, "train is on as well; choose one")
        if "chat_template" in tokenizer:
            refuse("chat_template", "a trained tokenizer always has nanochat's template")
        if tokenizer.get("vocab_size", 0) > model.get("vocab_size", 2**20):
            refuse("vocab_size", f"is above the model's vocab_size, {model['vocab_size']:,}")


# --- a stage ---


@dataclass
class Section:
    """A stage's section while its rules are checked."""

    stage: str  # base, mid or sft
    node: Node
    settings: dict[str, Any]  # the values by key; rules fill in and drop some

    def where(self, key: str) -> str:
        """The place of a key, or of the section where the key is not set."""
        return self.node.value[key].where if key in self.node.value else self.node.where

    def error(self, key: str, problem: str) -> RecipeError:
        """The error of a key, with its place."""
        return RecipeError(f"{self.where(key)}: {self.stage}.{key}: {problem}")


def check_stage(stage: str, node: Node) -> Section:
    """Check a stage's section: each key by itself, then the rules that span keys, in order.

    Raises:
        RecipeError: for the first key or rule that fails.
    """
    section = Section(stage, node, check_section(node, stage, stage_fields(stage)))
    if "data" not in section.settings:
        raise RecipeError(f"{node.where}: {stage}: needs data, such as [{{path: identity}}]")
    section.settings["data"] = check_data(node.value["data"], f"{stage}.data")
    check_replay(section)
    check_eval_steps(section)
    check_renamed(section)
    check_row_length(section)
    check_precision(section)
    check_memory_limit(section)
    check_auto_batch_size(section)
    check_lora(section)
    check_muon(section)
    check_update_after_the_step(section)
    check_step_divides_into_rows(section)
    check_steps_or_epochs(section)
    check_start(section)
    return section


def check_data(node: Node, section: str) -> list[Source]:
    """Check a stage's `data`; returns its sources."""
    if not isinstance(node.value, list) or not node.value:
        raise RecipeError(
            f"{node.where}: {section}: expected a list of sources, such as [{{path: identity}}]"
        )
    sources = []
    for index, item in enumerate(node.value):
        if isinstance(item.value, str):  # `data: [identity]`
            item = Node({"path": item}, item.where)
        sources.append(_check_source(item, f"{section}.{index}", Source, source_fields()))
    return sources


def check_replay(section: Section) -> None:
    """`replay` is a source with a share."""
    if section.settings.get("replay") is not None:
        node, place = section.node.value["replay"], f"{section.stage}.replay"
        section.settings["replay"] = _check_source(node, place, Replay, replay_fields())


def _check_source(node: Node, place: str, kind: type[Source], known: dict[str, Key]) -> Source:
    """Check one source; `kind` is what to make of it."""
    checked = check_section(node, place, known)
    if "path" not in checked:
        raise RecipeError(f"{node.where}: {place}: a source needs a path")
    for column in checked.get("columns", ()):
        child = node.value["columns"].value[column]
        checked["columns"][column] = child.value = check_value(
            f"{place}.columns.{column}", child, Field("str")
        )
    source = kind(**checked)
    problem = _source_problem(source, place.partition(".")[0])
    if problem:
        raise RecipeError(f"{node.where}: {place}: {problem}")
    return source


def _source_problem(source: Source, stage: str) -> str | None:
    """Why a stage cannot read a source, if it cannot."""
    if source.streaming and stage != "base":
        return (
            f"streaming is for base text; {stage} shuffles conversations and needs all of {source}"
        )
    if source.streaming and (source.rows or source.first or source.copies != 1):
        return f"{source} is streamed, and takes no rows, first, repeat or weight"
    if stage == "base" and source.format not in (None, "text"):
        return f"format {source.format} is for mid and sft; base trains on text"
    if stage != "base" and source.format == "text":
        return f"format text is for base; {stage} trains on conversations"
    return None


def check_eval_steps(section: Section) -> None:
    """`eval_steps: -1` turns validation off; other values must be above 0."""
    steps = section.settings.get("eval_steps")
    if steps is None or steps > 0:
        return
    if steps != -1:
        raise section.error(
            "eval_steps",
            "expected a number above 0, or -1 for no validation, got "
            f"{section.node.value['eval_steps'].raw}",
        )
    section.settings["eval_strategy"] = "no"
    del section.settings["eval_steps"]


def check_renamed(section: Section) -> None:
    """Deprecated names are replaced by the new ones; only one of the two may be given."""
    node, settings = section.node, section.settings
    for old, new in RENAMED.items():
        if new in settings and old in settings:
            if not is_default(node.value[old]):
                raise section.error(
                    new, f"is given as {old} as well ({section.where(old)}); choose one"
                )
            del settings[old], node.value[old]
        elif old in settings:
            settings[new] = settings.pop(old)


def check_row_length(section: Section) -> None:
    """Mid packs rows, whose length no model tells; base has its own model's."""
    if section.stage == "mid" and section.settings["max_length"] is None:
        raise section.error("max_length", "mid packs rows and needs their length")


def check_precision(section: Section) -> None:
    """bf16 and fp16 exclude each other."""
    if section.settings.get("bf16") and section.settings.get("fp16"):
        raise section.error("fp16", "bf16 is on as well; choose one")


def check_memory_limit(section: Section) -> None:
    """`memory_limit` must be a size."""
    limit = section.settings.get("memory_limit")
    if limit is not None:
        size_in_bytes(limit, f"{section.where('memory_limit')}: {section.stage}.memory_limit")


def check_auto_batch_size(section: Section) -> None:
    """Base and mid need `tokens_per_step` for `auto`: else the batch size would set the step's."""
    key, settings = "per_device_train_batch_size", section.settings
    if section.stage != "sft" and settings[key] == AUTO and not settings.get("tokens_per_step"):
        raise section.error(key, "auto needs tokens_per_step, which fixes the size of a step")


def check_lora(section: Section) -> None:
    """`lora` holds fields of LoraConfig; 4-bit weights need it."""
    settings = section.settings
    if settings.get("lora") is not None:
        place = f"{section.stage}.lora"
        settings["lora"] = check_section(section.node.value["lora"], place, lora_section())
    if settings.get("load_in_4bit") and settings.get("lora") is None:
        raise section.error(
            "load_in_4bit", "4-bit weights cannot be trained themselves; add lora: {r: 16}"
        )


def check_muon(section: Section) -> None:
    """`muon` holds the settings of `optim: muon`, which trains whole matrices."""
    settings = section.settings
    if settings.get("muon") is not None:
        known = check_section(section.node.value["muon"], f"{section.stage}.muon", MUON_SETTINGS)
        settings["muon"] = known
        if settings["optim"] != MUON:
            raise section.error("muon", f"is for optim: muon, and optim is {settings['optim']}")
    if settings["optim"] == MUON and settings.get("lora") is not None:
        raise section.error("optim", "muon trains whole matrices; use adamw_torch_fused with lora")


def check_update_after_the_step(section: Section) -> None:
    """Refuse optimizers that update weights in the backward pass, before the step is summed up."""
    optim = section.settings["optim"]
    if optim.endswith("layerwise") or optim in ("lomo", "adalomo"):
        raise section.error(
            "optim",
            f"{optim} updates weights in the backward pass of each micro-batch, not once a step",
        )


def check_step_divides_into_rows(section: Section) -> None:
    """`tokens_per_step` must be a multiple of a row's tokens; `auto` is for base."""
    tokens, length = section.settings.get("tokens_per_step"), section.settings.get("max_length")
    if tokens == AUTO and section.stage != "base":
        raise section.error("tokens_per_step", "auto is for base, whose model is built to a size")
    if tokens and tokens != AUTO and length:
        check_tokens_per_step(section.stage, tokens, length, 1, section.where("tokens_per_step"))


def check_steps_or_epochs(section: Section) -> None:
    """`max_steps` or `num_train_epochs` sets the length; a default `max_steps` yields to epochs.

    In base, tokens per parameter may set it instead.
    """
    node, settings = section.node, section.settings
    if check_tokens_per_parameter(section):
        return
    if settings.get("max_steps") is None and "num_train_epochs" not in settings:
        raise RecipeError(
            f"{section.where('max_steps')}: {section.stage}: needs max_steps (or num_train_epochs)"
        )
    if "num_train_epochs" not in settings or "max_steps" not in settings:
        return
    if settings["max_steps"] is not None and not is_default(node.value["max_steps"]):
        raise section.error(
            "num_train_epochs",
            f"max_steps is given as well ({section.where('max_steps')}); choose one",
        )
    del settings["max_steps"], node.value["max_steps"]


def check_tokens_per_parameter(section: Section) -> bool:
    """Whether tokens per parameter set the length: alone, and of steps whose size is known."""
    settings = section.settings
    given = [key for key in PER_PARAMETER if settings.get(key) is not None]
    if not given:
        return False
    others = [key for key in ("max_steps", "num_train_epochs") if settings.get(key) is not None]
    if len(given + others) > 1:
        other = (given + others)[1]
        raise section.error(
            given[0], f"{other} is given as well ({section.where(other)}); choose one"
        )
    if not settings.get("tokens_per_step"):
        raise section.error(given[0], "needs tokens_per_step: a number or auto")
    return True


def check_start(section: Section) -> None:
    """A stage can start from an earlier stage only."""
    position, start = STAGES.index(section.stage), section.settings.get("model_name_or_path")
    if start in STAGES[position:]:
        raise section.error(
            "model_name_or_path",
            f"{section.stage} cannot start from {start}; earlier stages are "
            f"{', '.join(STAGES[:position]) or 'none'}",
        )


# --- a stage and the model it trains ---


def check_base(section: Section, model: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Base needs a model to build, and a tokenizer for it."""
    place = section.node.where
    if "depth" not in model and "model_type" not in model:
        raise RecipeError(
            f"{place}: base: builds a fresh model and needs model: {{depth: 8}}, or a model_type"
        )
    if not tokenizer.get("train") and "path" not in tokenizer:
        raise RecipeError(
            f"{place}: base: needs a tokenizer: {{train: true}} or {{path: FOLDER_OR_HUB_ID}}"
        )
    if tokenizer.get("train") and "vocab_size" not in model and "vocab_size" not in tokenizer:
        raise RecipeError(f"{place}: base: a tokenizer to train needs model: {{vocab_size: 65536}}")
    tokens, length = section.settings.get("tokens_per_step"), model.get("max_position_embeddings")
    if tokens and tokens != AUTO and length and not section.settings.get("max_length"):
        check_tokens_per_step("base", tokens, length, 1, section.where("tokens_per_step"))


def check_context(section: Section, model: dict[str, Any]) -> None:
    """`max_length` must not exceed the context of the model that base builds."""
    length, positions = section.settings.get("max_length"), model.get("max_position_embeddings")
    if not positions or not length or length <= positions:
        return
    node = section.node
    place = node.where if is_default(node.value["max_length"]) else section.where("max_length")
    raise RecipeError(
        f"{place}: {section.stage}.max_length: {length} is more than the model's "
        f"max_position_embeddings, {positions}"
    )


def check_tokens_per_step(stage: str, tokens: int, length: int, processes: int, where: str) -> int:
    """The rows of an optimizer step of `tokens` tokens.

    Args:
        stage: the section's name, for the error.
        tokens: tokens of an optimizer step, over all processes.
        length: tokens of a row.
        processes: the world size.
        where: the place to name in the error.

    Raises:
        RecipeError: if the tokens are not a multiple of one row on each process.
    """
    together = length * processes
    if tokens % together:
        below = tokens // together * together
        raise RecipeError(
            f"{where}: {stage}.tokens_per_step: {tokens:,} is no multiple of {together:,} "
            f"(rows of {length} tokens on {processes} device{'s' * (processes > 1)}); "
            f"try {below or together:,}"
        )
    return tokens // length
