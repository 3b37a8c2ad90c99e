"""YAML as nodes that know where each value comes from: a file and line, or a flag."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from hfsft.errors import RecipeError, quoted


@dataclass
class Node:
    """A value of a recipe, with the place it comes from."""

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
    """YAML 1.2's scalars: `no`, `on` and dates are text, `010` is ten, `1e-3` is a number."""


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


# a few hundred lines make a few thousand nodes; ten nested aliases can make billions
MAX_NODES = 100_000


MAX_DEPTH = 50


TAG = "tag:yaml.org,2002:"


def read_yaml(text: str, where: str, lines: bool) -> Node:
    """Parse YAML into nodes.

    Args:
        text: the YAML.
        where: the file or the flag it comes from.
        lines: whether `where` is a file, so that each node gets its line.

    Raises:
        RecipeError: naming the place, if it is not valid YAML or not plain data.
    """
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
    if root is None:
        return Node(None, f"{where}:1" if lines else where, "")
    converter = _Converter(loader, where, lines)
    return converter.convert(root, converter.line(root))


class _Converter:
    """Converts PyYAML's nodes to ours, with their places, within limits of size and depth."""

    def __init__(self, loader: yaml.SafeLoader, where: str, lines: bool):
        self.loader = loader
        self.where = where
        self.lines = lines
        self.count = 0

    def convert(self, node: yaml.Node, place: str, depth: int = 0) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise RecipeError(
                f"{self.where}: more than {MAX_NODES:,} values; are its aliases nested?"
            )
        if depth > MAX_DEPTH:
            raise RecipeError(
                f"{place}: nested more than {MAX_DEPTH} deep; does an alias contain itself?"
            )
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, place)
        if node.tag not in (f"{TAG}map", f"{TAG}seq"):
            raise RecipeError(f"{place}: remove the tag {node.tag.replace(TAG, '!!')}")
        if isinstance(node, yaml.SequenceNode):
            items = [self.convert(item, self.line(item), depth + 1) for item in node.value]
            return Node(items, place)
        return self.mapping(node, place, depth)

    def mapping(self, node: yaml.MappingNode, place: str, depth: int) -> Node:
        merged: dict[str, Node] = {}
        own: dict[str, Node] = {}
        seen: dict[str, str] = {}
        for key, value in node.value:
            line = self.line(key)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{line}: a key must be plain text")
            if key.value in seen:
                raise RecipeError(
                    f"{line}: {quoted(key.value)} is given twice, first at {seen[key.value]}"
                )
            seen[key.value] = line
            child = self.convert(value, line, depth + 1)
            if key.tag != f"{TAG}merge":
                own[key.value] = child
                continue
            parts = child.value if isinstance(child.value, list) else [child]
            for part in reversed(parts):  # the first of a list wins
                if not isinstance(part.value, dict):
                    raise RecipeError(f"{line}: << takes a mapping, got {kind(part)}")
                merged |= part.value
        return Node(merged | own, place)

    def scalar(self, node: yaml.ScalarNode, place: str) -> Node:
        untagged = self.loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag not in (untagged, f"{TAG}str"):
            raise RecipeError(f"{place}: remove the tag {node.tag.replace(TAG, '!!')}")
        try:
            return Node(self.loader.construct_object(node), place, node.value)
        except ValueError:  # Python converts at most 4,300 digits to an int
            raise RecipeError(f"{place}: cannot read {quoted(node.value)}") from None

    def line(self, node: yaml.Node) -> str:
        return f"{self.where}:{node.start_mark.line + 1}" if self.lines else self.where


def as_node(data: Any, where: str) -> Node:
    """Plain data as nodes that all come from one place."""
    if isinstance(data, dict):
        return Node({key: as_node(value, where) for key, value in data.items()}, where)
    if isinstance(data, list):
        return Node([as_node(item, where) for item in data], where)
    if data is None or isinstance(data, bool):
        return Node(data, where, {None: "null", True: "true", False: "false"}[data])
    return Node(data, where, str(data))


def merge(lower: Node, upper: Node) -> Node:
    """Lay `upper` over `lower`: mappings merge, everything else replaces."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    merged = dict(lower.value)
    for key, node in upper.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, upper.where)


def kind(node: Node) -> str:
    """What a node holds, for an error message: "a mapping", "a list", or the value itself."""
    if isinstance(node.value, (dict, list)):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    if isinstance(node.value, str):
        return quoted(node.raw or node.value)
    return node.raw or "nothing"
