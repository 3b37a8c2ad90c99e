"""The documentation names only what exists: files, commands, flags, recipe keys, make targets."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

from hfsft.cli import app
from hfsft.errors import RecipeError
from hfsft.recipe.loading import load_recipe

ROOT = Path(__file__).parents[1]
STAGES = ("base", "mid", "sft")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def code_lines(page: Path) -> Iterator[str]:
    """Every line of a code block, and every piece of inline code."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S):
        yield from block.splitlines()
    text = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each `hfsft COMMAND ...`, and each stage's script, as a command and its arguments."""
    for line in code_lines(page):
        for part in line.split(" && "):
            script = re.search(r"\bhfsft[/.](base|mid|sft)(?:\.py)?\b(?= [\w./])", part)
            if part.startswith("hfsft ") and len(words := shlex.split(part)) > 1:
                yield words[1], words[2:]
            elif "accelerate launch" in part and script:
                yield script[1], shlex.split(part[script.end() :])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def example_recipe(given: str) -> str:
    """The recipe that a documented command names; the reader's own file stands for the demo."""
    return given if (ROOT / given).is_file() else "demo"


@per_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


@per_page
def test_commands_and_their_flags_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = get_command(app).commands
    for name, arguments in commands_of(page):
        shown = f"{page.name}: hfsft {name} {' '.join(arguments)}"
        assert name in known or name == "COMMAND" or name.startswith("-"), shown
        if name not in known or not arguments:
            continue
        # parsed as on the command line, without running it; what is left over are recipe keys
        try:
            context = known[name].make_context(name, list(arguments))
        except (typer.Exit, typer.BadParameter) as error:
            pytest.fail(f"{shown}: {error}")
        if "recipe" in context.params:
            stage = name if name in STAGES else None
            recipe = example_recipe(context.params["recipe"])
            load_recipe(recipe, *context.args, stage=stage)
        else:
            assert not context.args, shown


def is_recipe_key(flag: str) -> bool:
    """Whether the command line of an sft stage knows `flag`, even if it needs a value."""
    try:
        load_recipe("demo", flag, stage="sft")
    except RecipeError as error:
        return "unknown key" not in str(error)
    return True


def test_an_unknown_key_is_recognised():
    assert is_recipe_key("--max_steps") and is_recipe_key("--restart")
    assert not is_recipe_key("--max_stepz")


@per_page
def test_flags_alone_exist(page):
    """Inline code such as `--max_steps 300` names an option of a command, or a recipe key."""
    commands = get_command(app).commands.values()
    options = {flag for command in commands for option in command.params for flag in option.opts}
    for line in code_lines(page):
        flag = re.match(r"--[a-z][\w.-]*", line)
        if flag is None or flag[0] in options:
            continue
        assert is_recipe_key(flag[0]), f"{page.name}: {flag[0]}"
        if flag[0] != line:  # with its value
            load_recipe("fast", *shlex.split(line), stage="sft")


@per_page
def test_recipes_in_the_text_load(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)):
        assert isinstance(yaml.safe_load(block), dict), block
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        load_recipe(str(path))


@per_page
def test_files_and_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in code_lines(page):
        for target in re.findall(r"^make ([\w-]+)", line):
            assert target in targets, f"{page.name}: make {target}"
        folders = "recipes|accelerate_configs|benchmarks|tests|hfsft"
        for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]+\.\w+", line):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"


def test_every_recipe_and_config_is_documented():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for folder, pattern in (("recipes", "*.yaml"), ("accelerate_configs", "*.yaml")):
        for path in (ROOT / folder).glob(pattern):
            assert f"{folder}/{path.name}" in text
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"make_data.py"}
    assert all(f"benchmarks/{name}" in text for name in scripts)


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name
