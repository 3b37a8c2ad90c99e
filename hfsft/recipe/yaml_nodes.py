"""YAML as nodes that know the file and line, or the flag, that each value came from."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from hfsft.errors import RecipeError, quoted


@dataclass
class Node:
    """A value of a recipe, with the place that gave it."""

    value: Any  # dict[str, Node], list[Node] or a scalar
    where: str  # "fast.yaml:12" or "--max_steps"
    raw: str | None = None  # a scalar as it was written

    def plain(self) -> Any:
        """The value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no` and `on` are text, `010` is ten, `1e-3` a number, dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


_Loader.add_constructor("tag:yaml.org,2002:bool", lambda _, node: node.value.lower() == "true")


_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


# a file of a few hundred lines has a few thousand nodes; ten nested aliases can make billions
MAX_NODES = 100_000


MAX_DEPTH = 50


TAG = "tag:yaml.org,2002:"


def read_yaml(text: str, where: str, lines: bool) -> Node:
    """Parse `text`; `where` names the file (with `lines`, each node gets its line) or the flag."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark and lines else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{place}: not valid YAML: {problem}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    count = 0

    def convert(node: yaml.Node, place: str, depth: int = 0) -> Node:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            raise RecipeError(f"{where}: more than {MAX_NODES:,} values; do its aliases nest?")
        if depth > MAX_DEPTH:
            raise RecipeError(
                f"{place}: nested more than {MAX_DEPTH} deep; does an alias hold itself?"
            )
        if isinstance(node, yaml.ScalarNode):
            return scalar(node, place)
        if node.tag not in (f"{TAG}map", f"{TAG}seq"):
            raise RecipeError(f"{place}: leave the tag {node.tag.replace(TAG, '!!')} out")
        if isinstance(node, yaml.SequenceNode):
            return Node([convert(item, line(item), depth + 1) for item in node.value], place)
        merged: dict[str, Node] = {}
        own: dict[str, Node] = {}
        seen: dict[str, str] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{line(key)}: a key must be plain text")
            if key.value in seen:
                raise RecipeError(
                    f"{line(key)}: {quoted(key.value)} is given twice, first at {seen[key.value]}"
                )
            seen[key.value] = line(key)
            child = convert(value, line(key), depth + 1)
            if key.tag != f"{TAG}merge":
                own[key.value] = child
                continue
            parts = child.value if isinstance(child.value, list) else [child]
            for part in reversed(parts):  # the first of a list wins
                if not isinstance(part.value, dict):
                    raise RecipeError(f"{line(key)}: << takes a mapping, got {kind(part)}")
                merged |= part.value
        return Node(merged | own, place)

    def scalar(node: yaml.ScalarNode, place: str) -> Node:
        untagged = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag not in (untagged, f"{TAG}str"):
            raise RecipeError(f"{place}: leave the tag {node.tag.replace(TAG, '!!')} out")
        try:
            return Node(loader.construct_object(node), place, node.value)
        except ValueError:  # Python reads whole numbers of up to 4,300 digits
            raise RecipeError(f"{place}: cannot read {quoted(node.value)}") from None

    def line(node: yaml.Node) -> str:
        return f"{where}:{node.start_mark.line + 1}" if lines else where

    if root is None:
        return Node(None, f"{where}:1" if lines else where, "")
    return convert(root, line(root))


def merge(lower: Node, upper: Node) -> Node:
    """Lay `upper` over `lower`: mappings merge, everything else replaces."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    merged = dict(lower.value)
    for key, node in upper.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, upper.where)


def kind(node: Node) -> str:
    """What a node holds, in the words of an error: "a mapping", "a list", or the value itself."""
    if isinstance(node.value, (dict, list)):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    if isinstance(node.value, str):
        return quoted(node.raw or node.value)
    return node.raw or "nothing"
