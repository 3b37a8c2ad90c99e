"""The package's layout: names that shadow nothing, rows that import downwards, docstrings."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hfsft"
FILES = sorted(PACKAGE.rglob("*.py"))
# the one table of rooms and their files, in order: each imports only from those before it
TABLE = re.findall(
    r"^\| `(\w+)(/|\.py)` \| [^|]* \|([^|]*)\|$",
    (PACKAGE.parent / "CONTRIBUTING.md").read_text(),
    re.M,
)
ORDER = [
    module
    for room, kind, files in TABLE
    for module in (
        [room]
        if kind == ".py"
        else [room, *(f"{room}.{name}" for name in re.findall(r"`(\w+)`", files))]
    )
]
# every module that an installed distribution brings, hfsft apart
INSTALLED = {name for name, owners in packages_distributions().items() if set(owners) != {"hfsft"}}

per_file = pytest.mark.parametrize("path", FILES, ids=lambda path: name_of(path))


def name_of(path: Path) -> str:
    """`hfsft/run/disk.py` is run.disk, `hfsft/run/__init__.py` run, `hfsft/__init__.py` hfsft."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return "hfsft" if name == "__init__" else name.removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The hfsft modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "hfsft"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a script has no relative imports"
            if node.module.split(".")[0] == "hfsft":
                known = {f"hfsft.{name}" for name in MODULES}
                names = {f"{node.module}.{name.name}" for name in node.names}
                found |= (names & known) or {node.module}
    return {name.removeprefix("hfsft.") for name in found}


MODULES = {name_of(path) for path in FILES}


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


def test_the_table_names_every_file_once():
    assert sorted(["hfsft", *ORDER]) == sorted(MODULES)


@per_file
def test_imports_only_from_above(path):
    """No arrow goes back up, so there is no cycle either."""
    place = {name: number for number, name in enumerate(["hfsft", *ORDER])}
    for name in imported(path):
        assert place[name] < place[name_of(path)], f"{name_of(path)} imports {name}"


@per_file
def test_name_shadows_no_module(path):
    """Running hfsft/sft.py puts hfsft/ first on sys.path: `import logging` must not find ours."""
    name, *inside = name_of(path).split(".")
    assert "utils" not in (name, *inside)
    if not name.startswith("__") and name != "hfsft":
        assert name not in sys.stdlib_module_names
        assert name not in INSTALLED


@per_file
def test_docstrings_open_with_a_sentence(path):
    for name, node in documented(ast.parse(path.read_text()), name_of(path)):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        assert re.fullmatch(r"[^\s.](?!.*[.?!] [A-Z]).+[.?]", first), f"{name}: {first!r}"
