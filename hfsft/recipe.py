"""Recipes: one YAML file a run, with inheritance, command-line overrides, and every key checked.

Precedence: defaults.yaml < the recipe it extends < the recipe < the command line. Each value
carries the file and line (or the flag) it came from, so that every error can name its place.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from os.path import isdir, isfile  # where Path raises, on a name of 300 letters, they say no
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError
from hfsft.fields import (
    Field,
    lora_fields,
    model_fields,
    model_types,
    nearest,
    quoted,
)
from hfsft.keys import (
    ABOVE_ZERO,
    ALIASES,
    AUTO,
    AUTO_KEYS,
    FIELDS,
    FLAGS,
    LIMITS,
    MANAGED,
    MEMORY,
    MODEL_KEYS,
    OTHER_NAMES,
    REFUSED,
    REFUSED_LORA,
    RENAMED,
    SHARES,
    STAGES,
    TOKENIZER_KEYS,
    TOP_KEYS,
    stage_fields,
)
from hfsft.nodes import MAX_DEPTH, Node, kind, merge, read_yaml


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


def find_recipe(given: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with hfsft (`demo`).

    Raises:
        RecipeError: if there is no such file.
    """
    path = Path(given)
    if isfile(path):
        return path
    if isdir(path):
        raise RecipeError(f"{given} is a folder; give a recipe file, such as recipes/demo.yaml")
    built_in = _built_in(given)
    if built_in is not None:
        return built_in
    names = _built_in_names()
    raise RecipeError(
        f"no recipe {quoted(given)}: no such file, and those that come with hfsft are "
        f"{', '.join(names)}{nearest(path.stem, names)}"
    )


def _built_in(given: str) -> Path | None:
    """A recipe that comes with hfsft, as `demo`, `demo.yaml` or `recipes/demo.yaml`.

    A wheel's user has no clone, yet the README says recipes/demo.yaml.
    """
    folder, _, name = given.rpartition("/")
    name = name.removesuffix(".yaml")
    if folder in ("", "recipes") and name in _built_in_names():
        return recipes_folder() / f"{name}.yaml"
    return None


def _built_in_names() -> list[str]:
    return sorted(file.stem for file in recipes_folder().glob("*.yaml"))


def recipes_folder() -> Path:
    """The folder of the recipes that come with hfsft: inside the wheel, or beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _load_file(path: Path, chain: tuple[Path, ...] = ()) -> Node:
    """Read a recipe file and what it extends."""
    shown = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read: {error.strerror}") from None
    node = read_yaml(text, shown, lines=True)
    if node.value is None:
        raise RecipeError(f"{shown}: the file is empty; see recipes/demo.yaml for a whole one")
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: a recipe is a mapping of keys, not {kind(node)}")
    parent = node.value.pop("extends", None)
    if parent is None:
        return node
    name = _check_value("extends", parent, FIELDS["extends"])
    beside = path.parent / name
    parent_path = beside if isfile(beside) else _built_in(name)
    if parent_path is None:
        problem = f"no such file {quoted(str(beside))}{nearest(beside.stem, _built_in_names())}"
        if isdir(beside):
            problem = f"{quoted(str(beside))} is a folder, not a recipe"
        raise RecipeError(f"{parent.where}: extends: {problem}")
    if parent_path.resolve() in [path.resolve(), *chain]:
        raise RecipeError(f"{parent.where}: extends: {name} extends this file in turn")
    if len(chain) == MAX_DEPTH:
        raise RecipeError(f"{parent.where}: extends: more than {MAX_DEPTH} recipes in a row")
    return merge(_load_file(parent_path, (*chain, path.resolve())), node)


# --- the command line ---


def _split_arguments(argv: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Pair `--key value` and `--key=value`; a key without a value gets None."""
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise RecipeError(
                f"unexpected argument {quoted(word)}; settings are given as --key value"
            )
        name, equals, value = word[2:].partition("=")
        if equals:
            yield name, value
        elif position < len(argv) and not re.match(r"--[A-Za-z]", argv[position]):
            yield name, argv[position]
            position += 1
        else:
            yield name, None


def _apply_overrides(tree: Node, argv: tuple[str, ...], stage: str | None) -> dict[str, bool]:
    """Lay the command line over the tree, in place; returns the flags that were given."""
    flags = dict.fromkeys(FLAGS, False)
    seen: dict[tuple[str, ...], str] = {}
    for name, value in _split_arguments(argv):
        flag = f"--{quoted(name)[1:-1]}"
        if name in FLAGS:
            if value is not None and value.lower() not in ("true", "false"):
                raise RecipeError(f"{flag}: takes no value, got {quoted(value)}")
            if (name,) in seen:
                raise RecipeError(f"{flag}: given twice")
            seen[(name,)] = flag
            flags[name] = value is None or value.lower() == "true"
            continue
        path = _override_path(name, flag, stage, tree)
        if path in seen:
            raise RecipeError(f"{flag}: given twice, first as {seen[path]}")
        for earlier, its_flag in seen.items():
            if earlier[: len(path)] == path:
                raise RecipeError(f"{flag}: would undo {its_flag}; give {flag} first")
        seen[path] = flag
        if value is None and _takes_bool(path):
            value = "true"
        node = read_yaml(value or "", flag, lines=False)
        if node.value is None and not node.raw:
            raise RecipeError(f"{flag}: needs a value")
        if isinstance(node.value, (dict, list)):
            node.raw = value
        _set(tree, path, node, flag)
    return flags


def _override_path(name: str, flag: str, stage: str | None, tree: Node) -> tuple[str, ...]:
    parts = name.split(".")
    if not all(parts) or len(parts) > MAX_DEPTH:
        raise RecipeError(f"{flag}: a setting is named as --key or --section.key")
    top = parts[0] in TOP_KEYS
    if not top and parts[0] in REFUSED:
        raise RecipeError(f"{flag}: cannot be set: {REFUSED[parts[0]]}")
    if not top and stage is None:
        have = [section for section in STAGES if section in tree.value]
        if parts[0] in ALIASES or any(parts[0] in stage_fields(section) for section in STAGES):
            raise RecipeError(f"{flag}: of which stage? Say --{(have or ['sft'])[-1]}.{name}")
    known = [*TOP_KEYS, *FLAGS, *stage_fields(stage or "sft")]
    if not top and (stage is None or (len(parts) > 1 and parts[0] not in known)):
        raise RecipeError(f"{flag}: unknown key {quoted(name)}{_near(parts[0], known)}")
    if not top:
        parts = [stage, *parts]
    if parts[0] in STAGES and len(parts) > 1:
        parts[1] = ALIASES.get(parts[1], parts[1])
    return tuple(parts)


def _takes_bool(path: tuple[str, ...]) -> bool:
    """Whether a bare `--key` can mean true."""
    if path[0] in STAGES and len(path) == 2:
        known = stage_fields(path[0]).get(path[1])
        return known is None or "bool" in known.kinds
    return path[0] == "tokenizer" and path[1:] == ("train",)


def _set(tree: Node, path: tuple[str, ...], node: Node, flag: str) -> None:
    """Put `node` at a dotted path; list positions are numbers, missing mappings are made."""
    here = tree
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here.value, list):
            if not re.fullmatch("[0-9]{1,6}", key) or int(key) >= len(here.value):
                raise RecipeError(
                    f"{flag}: {'.'.join(path[:depth])} is a list of {len(here.value)}; "
                    f"{quoted(key)} is no position in it (the first is 0)"
                )
            if last:
                here.value[int(key)] = node
            else:
                here = here.value[int(key)]
            continue
        if not isinstance(here.value, dict):
            if here.value is not None:
                raise RecipeError(
                    f"{flag}: {'.'.join(path[:depth])} is {kind(here)} and has no keys"
                )
            here.value, here.where = {}, flag  # `lora: null` and --lora.r 8
        if last:
            here.value[key] = node
        else:
            here = here.value.setdefault(key, Node({}, flag))


# --- checking ---


def _check_value(key: str, node: Node, known: Field) -> Any:
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


def _check_section(node: Node, section: str, known: dict[str, Field]) -> dict[str, Any]:
    """Check a mapping's keys and values; returns it as plain data."""
    if node.value is None:
        node.value = {}
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {section}: expected a mapping, got {kind(node)}")
    _refuse_unknown(node, section, known)
    checked = {}
    for key, child in node.value.items():
        full = f"{section}.{key}" if section else key
        checked[key] = _check_value(full, child, known[key])
        if not isinstance(child.value, (dict, list)):
            child.value = checked[key]  # the run's copy of the recipe has it as it was taken
    return checked


def _refuse_unknown(node: Node, section: str, known: Collection[str]) -> None:
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
    near = _near(key, known)
    if near or len(known) < 15:
        return near or f"; known are {', '.join(sorted(known))}"
    upstream = "TrainingArguments" if section in ("base", "mid") else "trl.SFTConfig"
    upstream = "peft.LoraConfig" if section.endswith(".lora") else upstream
    return "" if section == "model" else f"; it is none of hfsft's, nor of {upstream}'s"


def _near(key: str, known: Collection[str]) -> str:
    meant = OTHER_NAMES.get(key)
    return f"; did you mean '{meant}'?" if meant in known else nearest(key, known)


def _check_data(node: Node, section: str) -> list[Source]:
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
        checked = _check_section(item, place, known)
        if "path" not in checked:
            raise RecipeError(f"{item.where}: {place}: a source needs a path")
        for column in checked.get("columns", ()):
            child = item.value["columns"].value[column]
            checked["columns"][column] = child.value = _check_value(
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


def _check_model(node: Node) -> dict[str, Any]:
    known = {key: FIELDS[key] for key in MODEL_KEYS}
    if isinstance(node.value, dict) and "model_type" in node.value:
        child = node.value["model_type"]
        model_type = _check_value("model.model_type", child, FIELDS["model_type"])
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
    return _check_section(node, "model", known)


def _check_stage(name: str, tree: Node, path: str) -> dict[str, Any]:
    """Check one stage's section, key by key and across keys; returns the arguments of `Stage`."""
    node = tree.value[name]
    checked = _check_section(node, name, stage_fields(name))

    def where(key: str) -> str:
        return node.value[key].where if key in node.value else node.where

    if "data" not in checked:
        raise RecipeError(f"{node.where}: {name}: needs data, such as [{{path: identity}}]")
    checked["data"] = _check_data(node.value["data"], f"{name}.data")
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
            if not _is_default(node.value[old]):
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
        checked["lora"] = _check_section(node.value["lora"], f"{name}.lora", lora_fields())
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
        if checked["max_steps"] is not None and not _is_default(steps):
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


def _is_default(node: Node) -> bool:
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


DEFAULTS = Path(__file__).with_name("defaults.yaml")


def load_recipe(given: str = "", *argv: str, stage: str | None = None) -> Recipe:
    """Load a recipe, lay the command line over it, and check every key and value.

    Args:
        given: a path, or the name of a recipe that comes with hfsft.
        argv: the rest of the command line: `--key value`, `--key=value`, flags.
        stage: the stage whose script runs: its keys may be given without the section's name.

    Raises:
        RecipeError: naming file and line (or the flag), the key, and the mend.
    """
    if not given or given.startswith("--"):
        script = stage or "run"
        raise RecipeError(f"which recipe? For example: hfsft {script} recipes/demo.yaml")
    path = find_recipe(given)
    own = _load_file(path)
    _refuse_unknown(own, "", TOP_KEYS)
    home = own.value.get("output_dir"), own.value.get("name")
    defaults = _load_file(DEFAULTS)
    sections = {name: defaults.value.pop(name) for name in STAGES}
    defaults.value["name"] = Node(path.stem, str(path), path.stem)
    tree = merge(defaults, own)
    flags = _apply_overrides(tree, argv, stage)
    present = [name for name in STAGES if name in tree.value and tree.value[name].value is not None]
    for name in STAGES:
        if name in present:
            tree.value[name] = merge(sections[name], tree.value[name])
        else:
            tree.value.pop(name, None)
    if stage is not None and stage not in present:
        raise RecipeError(f"{path}: has no {stage} section; it has {', '.join(present) or 'none'}")

    top = {
        key: FIELDS.get(key, Field("dict | str | None" if key == "tokenizer" else "dict | None"))
        for key in TOP_KEYS
    }
    checked = _check_section(tree, "", top)
    name = checked["name"]
    if name in (".", "..") or Path(name).name != name or not _is_folder_name(name):
        raise RecipeError(
            f"{tree.value['name'].where}: name: {quoted(name)} cannot be a folder's name"
        )
    model = _check_model(tree.value["model"]) if checked.get("model") else {}
    if isinstance(checked.get("tokenizer"), str):  # `tokenizer: gpt2`
        tree.value["tokenizer"] = Node(
            {"path": tree.value["tokenizer"]}, tree.value["tokenizer"].where
        )
    tokenizer = _check_section(
        tree.value["tokenizer"], "tokenizer", {key: FIELDS[key] for key in TOKENIZER_KEYS}
    )
    _check_tokenizer(tree, model, tokenizer)
    sample_prompts = checked["sample_prompts"]
    for index, prompt in enumerate(tree.value["sample_prompts"].value):
        if not isinstance(prompt.value, str):
            raise RecipeError(
                f"{prompt.where}: sample_prompts.{index}: expected text, got {kind(prompt)}"
            )
    folder = Path(checked["output_dir"]) / name
    stages = {}
    from_base = {"base"} & set(present)  # the stages whose model is the one that base builds
    positions = model.get("max_position_embeddings")
    for stage_name in present:
        settings = _check_stage(stage_name, tree, given)
        if stage_name == "base":
            _check_base(tree, settings, model, tokenizer)
        elif settings["model_name_or_path"] in from_base:
            from_base.add(stage_name)
        length = settings.get("max_length")
        if stage_name in from_base and positions and length and length > positions:
            section = tree.value[stage_name]
            given_length = section.value["max_length"]
            place = section.where if _is_default(given_length) else given_length.where
            raise RecipeError(
                f"{place}: {stage_name}.max_length: {length} is more than the model's "
                f"max_position_embeddings, {positions}"
            )
        own_keys = {key: settings.pop(key) for key in list(settings) if key in STAGE_FIELDS}
        start = own_keys.get("model_name_or_path")
        if start in STAGES:
            start = _earlier_stage(start, folder, home, path)
            own_keys["model_name_or_path"] = start
            if Path(start).parent != folder:  # the copy of the recipe must find it again
                tree.value[stage_name].value["model_name_or_path"].value = start
        stages[stage_name] = Stage(
            name=stage_name,
            folder=folder / stage_name,
            seed=checked["seed"],
            sample_prompts=sample_prompts,
            trainer=settings,
            trust_remote_code=flags["trust_remote_code"],
            quiet=flags["quiet"],
            **own_keys,
        )
    return Recipe(
        path=given,
        name=name,
        output_dir=checked["output_dir"],
        seed=checked["seed"],
        model=model,
        tokenizer=tokenizer,
        sample_prompts=sample_prompts,
        stages=stages,
        resolved=tree.plain(),
        arguments=argv,
        **flags,
    )


STAGE_FIELDS = {item.name for item in dataclass_fields(Stage)} - {"trainer"}


def _check_base(
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


def _check_tokenizer(tree: Node, model: dict[str, Any], tokenizer: dict[str, Any]) -> None:
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


def _is_folder_name(name: str) -> bool:
    return name.isprintable() and name == name.strip() and len(name.encode()) < 200


def _earlier_stage(
    start: str, folder: Path, home: tuple[Node | None, Node | None], path: Path
) -> str:
    """The folder of an earlier stage of this run.

    A run that the command line gave another name or place starts from the recipe's own run where it
    has no such stage itself: `hfsft sft recipes/demo.yaml --name faster` needs no second base and
    mid.
    """
    own = folder / start
    output_dir, name = home
    original = (
        Path(str(output_dir.plain()) if output_dir else "runs")
        / (str(name.plain()) if name else path.stem)
        / start
    )
    if isfile(original / "config.json") and not isfile(own / "config.json"):
        return str(original)
    return str(own)
