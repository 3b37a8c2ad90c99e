"""Recipes: one YAML file a run, with inheritance, command-line overrides, and every key checked.

Precedence: hfsft's defaults < the recipe it extends < the recipe < the command line. Each value
carries the file and line (or the flag) it came from, so that every error can name its place.
"""

import re
from collections.abc import Iterator
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, nearest, quoted
from hfsft.recipe.checks import (
    DEFAULTS,
    Section,
    check_base,
    check_context,
    check_model,
    check_name,
    check_sample_prompts,
    check_section,
    check_stage,
    check_tokenizer,
    check_value,
    is_default,
    near,
    refuse_unknown,
)
from hfsft.recipe.key import STAGES, declared_keys
from hfsft.recipe.names import ALIASES, FLAGS, REFUSED
from hfsft.recipe.schema import Recipe, Stage
from hfsft.recipe.sections import (
    EXTENDS,
    GENERATION,
    TOKENIZER,
    TOP,
    stage_defaults,
    stage_fields,
    top_defaults,
)
from hfsft.recipe.yaml_nodes import MAX_DEPTH, Node, as_node, kind, merge, read_yaml

# --- files ---


def find_recipe(given: str) -> Path:
    """The file of a recipe: a path, or the name of a built-in one (`demo`).

    Raises:
        RecipeError: if there is no such file.
    """
    path = Path(given)
    if isfile(path):
        return path
    if isdir(path):
        own = next((run for run in (path, path.parent) if isfile(run / "recipe.yaml")), None)
        such = "such as recipes/demo.yaml" if own is None else f"for this run {own / 'recipe.yaml'}"
        raise RecipeError(f"{given} is a folder; give a recipe file, {such}")
    built_in = _built_in(given)
    if built_in is not None:
        return built_in
    names = _built_in_names()
    raise RecipeError(
        f"no recipe {quoted(given)}: no such file; the built-in recipes are "
        f"{', '.join(names)}{nearest(path.stem, names)}"
    )


def _built_in(given: str) -> Path | None:
    """The file of a built-in recipe given as `demo`, `demo.yaml` or `recipes/demo.yaml`.

    The last form lets the README's commands work without a clone.
    """
    folder, _, name = given.rpartition("/")
    name = name.removesuffix(".yaml")
    if folder in ("", "recipes") and name in _built_in_names():
        return recipes_folder() / f"{name}.yaml"
    return None


def _built_in_names() -> list[str]:
    return sorted(file.stem for file in recipes_folder().glob("*.yaml"))


def recipes_folder() -> Path:
    """The folder of the built-in recipes: inside the wheel, or beside the package in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "shipped" / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _load_file(path: Path, chain: tuple[Path, ...] = ()) -> Node:
    """Read a recipe file and what it extends; `chain` holds the files that extend it."""
    shown = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read: {error.strerror}") from None
    node = read_yaml(text, shown, lines=True)
    if node.value is None:
        raise RecipeError(f"{shown}: the file is empty; see recipes/demo.yaml for a complete one")
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: a recipe is a mapping of keys, not {kind(node)}")
    parent = node.value.pop("extends", None)
    if parent is None:
        return node
    name = check_value("extends", parent, EXTENDS)
    beside = path.parent / name
    parent_path = beside if isfile(beside) else _built_in(name)
    if parent_path is None:
        problem = f"no such file {quoted(str(beside))}{nearest(beside.stem, _built_in_names())}"
        if isdir(beside):
            problem = f"{quoted(str(beside))} is a folder, not a recipe"
        raise RecipeError(f"{parent.where}: extends: {problem}")
    if parent_path.resolve() in [path.resolve(), *chain]:
        raise RecipeError(f"{parent.where}: extends: circular, since {name} extends this file")
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
    """Apply the command line to the tree, in place; returns whether each of `FLAGS` is set."""
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
                raise RecipeError(f"{flag}: would overwrite {its_flag}; put {flag} before it")
        seen[path] = flag
        _set(tree, path, _override_value(path, value, flag), flag)
    return flags


def _override_value(path: tuple[str, ...], value: str | None, flag: str) -> Node:
    """The value of a flag, which is YAML."""
    if value is None and _takes_bool(path):
        value = "true"
    node = read_yaml(value or "", flag, lines=False)
    if node.value is None and not node.raw:
        raise RecipeError(f"{flag}: needs a value")
    if isinstance(node.value, (dict, list)):
        node.raw = value
    return node


def _override_path(name: str, flag: str, stage: str | None, tree: Node) -> tuple[str, ...]:
    """The path of the key that a flag names, from the top of the recipe."""
    parts = name.split(".")
    if not all(parts) or len(parts) > MAX_DEPTH:
        raise RecipeError(f"{flag}: write settings as --key or --section.key")
    top = parts[0] in TOP
    if not top and parts[0] in REFUSED:
        raise RecipeError(f"{flag}: cannot be set: {REFUSED[parts[0]]}")
    if not top and stage is None:
        have = [section for section in STAGES if section in tree.value]
        if parts[0] in ALIASES or any(parts[0] in stage_fields(section) for section in STAGES):
            raise RecipeError(f"{flag}: of which stage? Say --{(have or ['sft'])[-1]}.{name}")
    known = [*TOP, *FLAGS, *stage_fields(stage or "sft")]
    if not top and (stage is None or (len(parts) > 1 and parts[0] not in known)):
        raise RecipeError(f"{flag}: unknown key {quoted(name)}{near(parts[0], known)}")
    if not top:
        parts = [stage, *parts]
    if parts[0] in STAGES and len(parts) > 1:
        parts[1] = ALIASES.get(parts[1], parts[1])
    return tuple(parts)


def _takes_bool(path: tuple[str, ...]) -> bool:
    """Whether a bare `--key` means true."""
    if path[0] in STAGES and len(path) == 2:
        known = stage_fields(path[0]).get(path[1])
        return known is None or "bool" in known.kinds
    return path[0] == "tokenizer" and path[1:] == ("train",)


def _set(tree: Node, path: tuple[str, ...], node: Node, flag: str) -> None:
    """Put `node` at a dotted path; lists take an index, missing mappings are created."""
    here = tree
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here.value, list):
            if not re.fullmatch("[0-9]{1,6}", key) or int(key) >= len(here.value):
                raise RecipeError(
                    f"{flag}: {'.'.join(path[:depth])} is a list of {len(here.value)}; "
                    f"{quoted(key)} is not an index into it (the first is 0)"
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
            here.value, here.where = {}, flag  # `lora: null` in the recipe, and --lora.r 8
        if last:
            here.value[key] = node
        else:
            here = here.value.setdefault(key, Node({}, flag))


# --- a recipe ---


def load_recipe(given: str = "", *argv: str, stage: str | None = None) -> Recipe:
    """Load a recipe, apply the command line to it, and check every key and value.

    Args:
        given: a path, or the name of a built-in recipe.
        argv: the rest of the command line: `--key value`, `--key=value`, flags.
        stage: the stage whose script runs: its keys may be given without the section's name.

    Raises:
        RecipeError: naming the file and line (or the flag), the key, and the fix.
    """
    if not given or given.startswith("--"):
        raise RecipeError(f"which recipe? For example: hfsft {stage or 'run'} recipes/demo.yaml")
    path = find_recipe(given)
    own = _load_file(path)
    refuse_unknown(own, "", TOP)
    original = _own_folder(own, path)
    tree, flags = _with_defaults_and_overrides(own, path, argv, stage)
    top, model, tokenizer = _check_top(tree)
    sections = _check_stages(tree, model, tokenizer)
    folder = Path(top["output_dir"]) / top["name"]
    for section in sections:
        _find_start(section, folder, original)
    own_keys = ("name", "output_dir", "seed", "sample_prompts", "generation")
    return Recipe(
        path=given,
        **{key: top[key] for key in own_keys},
        model=model,
        tokenizer=tokenizer,
        stages={section.stage: _make_stage(section, folder, top, flags) for section in sections},
        resolved=tree.plain(),
        arguments=argv,
        **flags,
    )


def _own_folder(own: Node, path: Path) -> Path:
    """The run's folder by the recipe alone, before the command line may rename or move it."""
    defaults = {"name": path.stem, "output_dir": TOP["output_dir"].default}
    given = {key: str(own.value[key].plain()) for key in defaults if key in own.value}
    return Path((defaults | given)["output_dir"], (defaults | given)["name"])


def _with_defaults_and_overrides(
    own: Node, path: Path, argv: tuple[str, ...], stage: str | None
) -> tuple[Node, dict[str, bool]]:
    """Lay a recipe over the defaults, and the command line over both.

    Returns:
        The tree, with a section for each stage of the run alone; and the flags.
    """
    defaults = as_node(top_defaults(), DEFAULTS)
    defaults.value["name"] = as_node(path.stem, str(path))
    tree = merge(defaults, own)
    flags = _apply_overrides(tree, argv, stage)
    for name in STAGES:
        section = tree.value.get(name)
        if section is None or section.value is None:
            tree.value.pop(name, None)
        else:
            tree.value[name] = merge(as_node(stage_defaults(name), DEFAULTS), section)
    if stage is not None and stage not in tree.value:
        present = [name for name in STAGES if name in tree.value]
        raise RecipeError(f"{path}: has no {stage} section; it has {', '.join(present) or 'none'}")
    return tree, flags


def _check_top(tree: Node) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Check all but the stages; returns the top level, `model` and `tokenizer` as plain data."""
    top = check_section(tree, "", TOP)
    check_name(tree.value["name"], top["name"])
    model = check_model(tree.value["model"]) if top.get("model") else {}
    if isinstance(top["tokenizer"], str):  # `tokenizer: gpt2`
        text = tree.value["tokenizer"]
        tree.value["tokenizer"] = Node({"path": text}, text.where)
    tokenizer = check_section(tree.value["tokenizer"], "tokenizer", TOKENIZER)
    check_tokenizer(tree.value["tokenizer"], model, tokenizer)
    check_sample_prompts(tree.value["sample_prompts"])
    top["generation"] = check_section(tree.value["generation"], "generation", GENERATION)
    return top, model, tokenizer


def _check_stages(tree: Node, model: dict[str, Any], tokenizer: dict[str, Any]) -> list[Section]:
    """Check every stage's section, by itself and against the model that it trains."""
    sections = []
    from_base = set()  # the stages whose model is the one that base builds
    for name in STAGES:
        if name not in tree.value:
            continue
        _start_from_base_without_mid(name, tree)
        section = check_stage(name, tree.value[name])
        if name == "base":
            check_base(section, model, tokenizer)
        if name == "base" or section.settings["model_name_or_path"] in from_base:
            from_base.add(name)
            check_context(section, model)
        sections.append(section)
    return sections


def _start_from_base_without_mid(name: str, tree: Node) -> None:
    """Let sft start from base by default where the recipe has a base and no mid."""
    start = tree.value[name].value.get("model_name_or_path") if name == "sft" else None
    if start is not None and is_default(start) and "base" in tree.value and "mid" not in tree.value:
        start.value = start.raw = "base"


def _find_start(section: Section, folder: Path, original: Path) -> None:
    """Replace the name of an earlier stage by that stage's folder.

    If the command line gave the run another name or place, and that run has no such stage itself,
    it is the stage of the recipe's original run: `hfsft sft recipes/demo.yaml --name faster` needs
    no second base and mid.
    """
    start = section.settings.get("model_name_or_path")
    if start not in STAGES:
        return
    own = folder / start
    if isfile(original / start / "config.json") and not isfile(own / "config.json"):
        own = original / start
    section.settings["model_name_or_path"] = str(own)
    if own.parent != folder:  # so that the run's copy of the recipe finds it again
        section.node.value["model_name_or_path"].value = str(own)


def _make_stage(
    section: Section, folder: Path, top: dict[str, Any], flags: dict[str, bool]
) -> Stage:
    """A checked section as a `Stage`; settings that are not its own keys go to the trainer."""
    own_keys = declared_keys(Stage)
    settings = section.settings
    return Stage(
        name=section.stage,
        folder=folder / section.stage,
        seed=top["seed"],
        sample_prompts=top["sample_prompts"],
        generation=top["generation"],
        trainer={key: value for key, value in settings.items() if key not in own_keys},
        trust_remote_code=flags["trust_remote_code"],
        quiet=flags["quiet"],
        **{key: value for key, value in settings.items() if key in own_keys},
    )
