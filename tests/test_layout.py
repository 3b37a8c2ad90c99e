"""The package's layout: names that shadow nothing, rows that import downwards, docstrings."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hfsft"
FILES = sorted(PACKAGE.rglob("*.py"))
# row → its files; one imports only from rows above its own
ROWS = [
    {"__init__"},
    {"errors", "fields"},
    {
        "keys",
        "nodes",
        "tasks",
        "hub",
        "templates",
        "head",
        "attention",
        "checkpoint",
        "disk",
        "calculator",
        "execution",
        "pages",
    },
    {"recipe"},
    {"record", "conversations", "tokenizer", "audit", "advice", "results"},
    {"packing", "model", "going_on", "pictures"},
    {"mixture", "traced", "answering"},
    {"corpus"},
    {"callbacks", "memory", "push", "card", "questions", "harness", "validation", "watchdog"},
    {"trainer", "timing"},
    {"training"},
    {"evaluation", "report", "comparison", "summary", "chat", "launch", "preview"},
    {"base", "mid", "sft"},
    {"cli", "__main__"},
]
# the only imports within a row: file → imported
SIBLINGS = {("comparison", "evaluation"), ("summary", "evaluation"), ("__main__", "cli")}
# every module that an installed distribution brings, hfsft apart
INSTALLED = {name for name, owners in packages_distributions().items() if set(owners) != {"hfsft"}}

per_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def imported(path: Path) -> set[str]:
    """The hfsft modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("hfsft")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a script has no relative imports"
            if node.module == "hfsft":
                found |= {f"hfsft.{name.name}" for name in node.names}
            elif node.module.startswith("hfsft."):
                found.add(node.module)
    modules = {name.removeprefix("hfsft.").partition(".")[0] for name in found}
    return {name if (PACKAGE / f"{name}.py").exists() else "__init__" for name in modules}


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """The nodes that need a docstring: a module, its public classes, functions and methods."""
    yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
            # what is inside a function is nobody's to call
            if isinstance(child, ast.ClassDef):
                yield from documented(child, f"{name}.{child.name}")
            else:
                yield f"{name}.{child.name}", child


def test_every_file_has_a_row():
    assert sorted(name for row in ROWS for name in row) == sorted(path.stem for path in FILES)


def test_contributing_shows_the_same_rows():
    table = re.findall(
        r"^\| (\d+) \| (.*?) \|", (PACKAGE.parent / "CONTRIBUTING.md").read_text(), re.M
    )
    shown: dict[int, set[str]] = {}
    for row, files in table:
        shown.setdefault(int(row), set()).update(re.findall(r"`(\w+)\.py`", files))
    assert [shown[row] for row in sorted(shown)] == ROWS[1:]


@per_file
def test_imports_only_from_rows_above(path):
    rows = {name: row for row, names in enumerate(ROWS) for name in names}
    for name in imported(path):
        above = rows[name] < rows[path.stem]
        assert above or (path.stem, name) in SIBLINGS, f"{path.stem} imports {name}"


def test_no_imports_in_a_circle():
    TopologicalSorter({path.stem: imported(path) for path in FILES}).prepare()


@per_file
def test_name_shadows_no_module(path):
    """Running hfsft/sft.py puts hfsft/ first on sys.path: `import logging` must not find ours."""
    if path.stem.startswith("__"):
        return
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in INSTALLED
    assert path.stem != "utils"


@per_file
def test_docstrings_open_with_a_sentence(path):
    for name, node in documented(ast.parse(path.read_text()), path.stem):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        assert re.fullmatch(r"[^\s.](?!.*[.?!] [A-Z]).+[.?]", first), f"{name}: {first!r}"
