"""Recipes: one YAML file a run, with inheritance, command-line overrides, and every key checked.

Precedence: defaults.yaml < the recipe it extends < the recipe < the command line. Each value
carries the file and line (or the flag) it came from, so that every error can name its place.
"""

import re
from collections.abc import Iterator
from os.path import isdir, isfile
from pathlib import Path

from hfsft.errors import RecipeError, nearest, quoted
from hfsft.recipe.checks import (
    DEFAULTS,
    check_base,
    check_model,
    check_section,
    check_stage,
    check_tokenizer,
    check_value,
    is_default,
    is_folder_name,
    near,
    refuse_unknown,
)
from hfsft.recipe.schema import (
    ALIASES,
    FIELDS,
    FLAGS,
    REFUSED,
    STAGE_FIELDS,
    STAGES,
    TOKENIZER_KEYS,
    TOP_KEYS,
    Recipe,
    Stage,
    stage_fields,
)
from hfsft.recipe.upstream import Field
from hfsft.recipe.yaml_nodes import MAX_DEPTH, Node, kind, merge, read_yaml


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
    package = Path(__file__).parents[1]
    inside = package / "shipped" / "recipes"
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
    name = check_value("extends", parent, FIELDS["extends"])
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
        raise RecipeError(f"{flag}: unknown key {quoted(name)}{near(parts[0], known)}")
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
    refuse_unknown(own, "", TOP_KEYS)
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
    checked = check_section(tree, "", top)
    name = checked["name"]
    if name in (".", "..") or Path(name).name != name or not is_folder_name(name):
        raise RecipeError(
            f"{tree.value['name'].where}: name: {quoted(name)} cannot be a folder's name"
        )
    model = check_model(tree.value["model"]) if checked.get("model") else {}
    if isinstance(checked.get("tokenizer"), str):  # `tokenizer: gpt2`
        tree.value["tokenizer"] = Node(
            {"path": tree.value["tokenizer"]}, tree.value["tokenizer"].where
        )
    tokenizer = check_section(
        tree.value["tokenizer"], "tokenizer", {key: FIELDS[key] for key in TOKENIZER_KEYS}
    )
    check_tokenizer(tree, model, tokenizer)
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
        settings = check_stage(stage_name, tree, given)
        if stage_name == "base":
            check_base(tree, settings, model, tokenizer)
        elif settings["model_name_or_path"] in from_base:
            from_base.add(stage_name)
        length = settings.get("max_length")
        if stage_name in from_base and positions and length and length > positions:
            section = tree.value[stage_name]
            given_length = section.value["max_length"]
            place = section.where if is_default(given_length) else given_length.where
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
