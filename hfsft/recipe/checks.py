"""Check a recipe's keys and values, one by one and across keys."""

from collections.abc import Collection
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, nearest, quoted
from hfsft.recipe.schema import (
    ABOVE_ZERO,
    ALIASES,
    AUTO,
    AUTO_KEYS,
    FIELDS,
    FLAGS,
    LIMITS,
    MANAGED,
    MODEL_KEYS,
    OTHER_NAMES,
    REFUSED,
    REFUSED_LORA,
    RENAMED,
    SHARES,
    STAGES,
    TOP_KEYS,
    Source,
    size_in_bytes,
    stage_fields,
)
from hfsft.recipe.upstream import Field, lora_fields, model_fields, model_types
from hfsft.recipe.yaml_nodes import Node, kind

# --- checking ---


def check_value(key: str, node: Node, known: Field) -> Any:
    """Check one value against its field and its limits; returns it as the field takes it."""
    name = key.rsplit(".", 1)[-1]
    if name in AUTO_KEYS and node.raw == AUTO:
        return AUTO
    try:
        value = known.check(node.plain(), node.raw)
        if value == "" and name in FIELDS:
            raise ValueError("must not be empty")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(name, value, node.raw)
        return value
    except ValueError as error:
        raise RecipeError(f"{node.where}: {key}: {error}") from None


def _check_number(name: str, value: float, raw: str | None) -> None:
    low, high = LIMITS.get(name, (value, value))
    shown = quoted(raw or str(value)).strip("'")
    if value > high:
        raise ValueError(f"{shown} is not possible: it must be at most {high:,}")
    if value < low or (name in ABOVE_ZERO and value == 0):
        sign = "above" if name in ABOVE_ZERO else "at least"
        raise ValueError(f"{shown} is not possible: it must be {sign} {low:,}")
    if name in SHARES and value > 1 and value != int(value):
        raise ValueError(
            f"{shown} is not possible: a share is below 1, and a number from 1 on is a whole one"
        )


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
            child.value = checked[key]  # the run's copy of the recipe has it as it was taken
    return checked


def refuse_unknown(node: Node, section: str, known: Collection[str]) -> None:
    """Raise a `RecipeError` for the first key that is not known, with the nearest one."""
    for key, child in node.value.items():
        full = f"{section}.{key}" if section else key
        if key == "trust_remote_code":
            raise RecipeError(
                f"{child.where}: {full}: only the command line may say it (--trust_remote_code): "
                "a recipe from elsewhere must not run code unasked"
            )
        if key in known:
            continue
        if key in REFUSED and section in ("", *STAGES):
            raise RecipeError(f"{child.where}: {full} cannot be set: {REFUSED[key]}")
        if key in REFUSED_LORA and section.endswith(".lora"):
            raise RecipeError(f"{child.where}: {full} cannot be set: {MANAGED}")
        place = f" in {section}" if section else ""
        raise RecipeError(
            f"{child.where}: unknown key {quoted(key)}{place}{_hint(key, section, known)}"
        )


def _hint(key: str, section: str, known: Collection[str]) -> str:
    """What was meant: a command-line alias, a key of another section, or the nearest here."""
    if key in ALIASES and ALIASES[key] in known:
        return f"; its name in a recipe is '{ALIASES[key]}'"
    if key in FLAGS:
        return f"; only the command line takes it (--{key})"
    if section and key in (*TOP_KEYS, "extends"):
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
        return nearest_key or f"; known are {', '.join(sorted(known))}"
    upstream = "TrainingArguments" if section in ("base", "mid") else "trl.SFTConfig"
    upstream = "peft.LoraConfig" if section.endswith(".lora") else upstream
    return "" if section == "model" else f"; it is none of hfsft's, nor of {upstream}'s"


def near(key: str, known: Collection[str]) -> str:
    """The end of an error message: the key that was meant, or the nearest."""
    meant = OTHER_NAMES.get(key)
    return f"; did you mean '{meant}'?" if meant in known else nearest(key, known)


def check_data(node: Node, section: str) -> list[Source]:
    """Check a stage's `data`; returns its sources."""
    if not isinstance(node.value, list) or not node.value:
        raise RecipeError(
            f"{node.where}: {section}: expected a list of sources, such as [{{path: identity}}]"
        )
    keys = {item.name for item in dataclass_fields(Source)}
    known = {key: FIELDS[key] for key in keys} | {"name": Field("str | None")}
    sources = []
    for index, item in enumerate(node.value):
        if isinstance(item.value, str):  # `data: [identity]`
            item = Node({"path": item}, item.where)
        place = f"{section}.{index}"
        checked = check_section(item, place, known)
        if "path" not in checked:
            raise RecipeError(f"{item.where}: {place}: a source needs a path")
        for column in checked.get("columns", ()):
            child = item.value["columns"].value[column]
            checked["columns"][column] = child.value = check_value(
                f"{place}.columns.{column}", child, Field("str")
            )
        source = Source(**checked)
        problem = _source_problem(source, section.partition(".")[0])
        if problem:
            raise RecipeError(f"{item.where}: {place}: {problem}")
        sources.append(source)
    return sources


def _source_problem(source: Source, stage: str) -> str | None:
    """What keeps a stage from reading a source, if anything."""
    if source.streaming and stage != "base":
        return (
            "streaming is for base text; a conversation's place in the run needs the whole of "
            f"{source}"
        )
    if source.streaming and (source.rows or source.first or source.copies != 1):
        return f"a streaming {source} is read as it trains: no rows, first, repeat or weight"
    if stage == "base" and source.format not in (None, "text"):
        return f"format {source.format} is for mid and sft; base learns from text"
    if stage != "base" and source.format == "text":
        return f"format text is for base; {stage} learns from conversations"
    return None


def check_model(node: Node) -> dict[str, Any]:
    """Check the `model` section; returns it as plain data."""
    known = {key: FIELDS[key] for key in MODEL_KEYS}
    if isinstance(node.value, dict) and "model_type" in node.value:
        child = node.value["model_type"]
        model_type = check_value("model.model_type", child, FIELDS["model_type"])
        upstream = model_fields(model_type)
        if not upstream:
            raise RecipeError(
                f"{child.where}: model.model_type: transformers knows no '{model_type}'"
                f"{nearest(model_type, model_types())}"
            )
        if "depth" in node.value:
            raise RecipeError(
                f"{node.value['depth'].where}: model.depth: model_type is given as well "
                f"({child.where}); choose one"
            )
        known = upstream | known
    return check_section(node, "model", known)


def check_stage(name: str, tree: Node, path: str) -> dict[str, Any]:
    """Check one stage's section, key by key and across keys; returns the arguments of `Stage`."""
    node = tree.value[name]
    checked = check_section(node, name, stage_fields(name))

    def where(key: str) -> str:
        return node.value[key].where if key in node.value else node.where

    if "data" not in checked:
        raise RecipeError(f"{node.where}: {name}: needs data, such as [{{path: identity}}]")
    checked["data"] = check_data(node.value["data"], f"{name}.data")
    if checked.get("eval_steps") is not None and checked["eval_steps"] <= 0:
        if checked["eval_steps"] != -1:
            raise RecipeError(
                f"{where('eval_steps')}: {name}.eval_steps: expected a number above 0, or -1 for "
                f"no validation, got {node.value['eval_steps'].raw}"
            )
        checked["eval_strategy"] = "no"
        del checked["eval_steps"]
    for old, new in RENAMED.items():
        if new in checked and old in checked:
            if not is_default(node.value[old]):
                raise RecipeError(
                    f"{where(new)}: {name}.{new}: is given as {old} as well ({where(old)})"
                )
            del checked[old], node.value[old]
        elif old in checked:
            checked[new] = checked.pop(old)
    if name == "mid" and checked["max_length"] is None:
        raise RecipeError(f"{where('max_length')}: mid.max_length: a packed row needs a length")
    if checked.get("bf16") and checked.get("fp16"):
        raise RecipeError(f"{where('fp16')}: {name}.fp16: bf16 is on as well; choose one")
    if checked.get("memory_limit") is not None:
        size_in_bytes(checked["memory_limit"], f"{where('memory_limit')}: {name}.memory_limit")
    batch = "per_device_train_batch_size"
    if name != "sft" and checked[batch] == AUTO and checked.get("tokens_per_step") is None:
        raise RecipeError(
            f"{where(batch)}: {name}.{batch}: auto needs tokens_per_step, which says how large a "
            "step is"
        )
    if checked.get("lora") is not None:
        checked["lora"] = check_section(node.value["lora"], f"{name}.lora", lora_fields())
    if checked.get("load_in_4bit") and checked.get("lora") is None:
        raise RecipeError(
            f"{where('load_in_4bit')}: {name}.load_in_4bit: 4-bit weights cannot be trained "
            "themselves; add lora: {r: 16}"
        )
    if checked.get("tokens_per_step") and checked.get("max_length"):
        check_tokens_per_step(
            name,
            checked["tokens_per_step"],
            checked["max_length"],
            1,
            where("tokens_per_step"),
        )
    if checked.get("max_steps") is None and "num_train_epochs" not in checked:
        raise RecipeError(f"{where('max_steps')}: {name}: needs max_steps (or num_train_epochs)")
    if "num_train_epochs" in checked and "max_steps" in checked:
        epochs, steps = node.value["num_train_epochs"], node.value["max_steps"]
        if checked["max_steps"] is not None and not is_default(steps):
            raise RecipeError(
                f"{epochs.where}: {name}.num_train_epochs: max_steps is given as well "
                f"({steps.where}); choose one"
            )
        del checked["max_steps"], node.value["max_steps"]  # the default gives way
    position = STAGES.index(name)
    if checked.get("model_name_or_path") in STAGES[position:]:
        raise RecipeError(
            f"{where('model_name_or_path')}: {name}.model_name_or_path: {name} cannot start from "
            f"{checked['model_name_or_path']}; earlier stages are "
            f"{', '.join(STAGES[:position]) or 'none'}"
        )
    return checked


def is_default(node: Node) -> bool:
    """Whether a value comes from hfsft's defaults."""
    return node.where.startswith(str(DEFAULTS))


def check_tokens_per_step(stage: str, tokens: int, length: int, processes: int, where: str) -> int:
    """The rows that make `tokens` an update.

    Args:
        stage: the section's name, for the error.
        tokens: tokens an optimizer update, over all processes.
        length: tokens a row.
        processes: how many processes train.
        where: the place to name in the error.

    Raises:
        RecipeError: if the tokens do not divide.
    """
    together = length * processes
    if tokens % together:
        below = tokens // together * together
        raise RecipeError(
            f"{where}: {stage}.tokens_per_step: {tokens:,} is no multiple of {together:,} "
            f"(rows of {length} tokens on {processes} device{'s' * (processes > 1)}); "
            f"{below or together:,} would do"
        )
    return tokens // length


DEFAULTS = Path(__file__).parents[1] / "defaults.yaml"


def check_base(
    tree: Node, settings: dict[str, Any], model: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    """What only the base stage needs: a model to build, and a tokenizer for it."""
    place = tree.value["base"].where
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
    rows, length = settings.get("tokens_per_step"), model.get("max_position_embeddings")
    if rows and length and not settings.get("max_length"):
        check_tokens_per_step(
            "base",
            rows,
            length,
            1,
            tree.value["base"].value["tokens_per_step"].where,
        )


def check_tokenizer(tree: Node, model: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """What a tokenizer cannot have at once."""

    def refuse(key: str, problem: str) -> None:
        where = tree.value["tokenizer"].value[key].where
        raise RecipeError(f"{where}: tokenizer.{key}: {problem}")

    if tokenizer.get("train"):
        for key in ("path", "revision"):
            if key in tokenizer:
                refuse(key, "train is on as well; choose one")
        if "chat_template" in tokenizer:
            refuse("chat_template", "a trained tokenizer has nanochat's own")
        if tokenizer.get("vocab_size", 0) > model.get("vocab_size", 2**20):
            refuse("vocab_size", f"is more than the model's vocab_size, {model['vocab_size']:,}")


def is_folder_name(name: str) -> bool:
    """Whether a run's name can be the name of a folder."""
    return name.isprintable() and name == name.strip() and len(name.encode()) < 200
