"""The fields of TrainingArguments, SFTConfig, LoraConfig and the model configs, from their source.

Importing those classes takes 5 s, since they import torch; parsing their source takes 0.1 s, so a
typo in a recipe is reported at once. Nothing is mirrored here: names, types and choices are
upstream's.
"""

import ast
import importlib.util
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hfsft.errors import nearest, quoted

# a type in an annotation → its description in an error message
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "None": "null",
}


TYPES = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "dict": dict,
    "list": list,
    "tuple": list,
    "None": type(None),
}


YES_NO = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@dataclass(frozen=True)
class Field:
    """One setting: its annotation as in upstream's source, and its choices, if it has any."""

    annotation: str
    choices: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The types in the annotation: `int | None` → ("int", "None")."""
        return _annotation_kinds(self.annotation)

    def check(self, value: Any, raw: str | None = None) -> Any:
        """Return `value` as this field takes it.

        Args:
            value: as parsed from YAML.
            raw: the scalar as written in the file; a text field takes this.

        Raises:
            ValueError: with the part of an error message that follows the key's name.
        """
        kinds = self.kinds
        if value is None:
            if "None" in kinds:
                return None
        elif isinstance(value, bool) and "bool" in kinds:
            return value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            # an integer of 400 digits is finite, but float() of it overflows
            if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > 1e300:
                raise ValueError(f"expected a finite number, got {raw or value}")
            if isinstance(value, int) and "int" in kinds:
                return value
            if "float" in kinds:
                return float(value)
        elif isinstance(value, dict) and "dict" in kinds:
            return value
        elif isinstance(value, list) and ("list" in kinds or "tuple" in kinds):
            for item in value:
                self._check_item(item)
            return value
        elif isinstance(value, str) and "bool" in kinds and value.lower() in YES_NO:
            return YES_NO[value.lower()]
        scalar = not isinstance(value, (dict, list))
        # `name: 5` means the text, but `target_modules: 5` (text or list) is a mistake
        only_text = scalar and value is not None and set(kinds) <= {"str", "None"}
        if only_text or (isinstance(value, str) and "str" in kinds):
            text = raw if raw is not None else str(value)
            if "\0" in text:
                raise ValueError(f"{quoted(text)} contains a NUL character")
            self._check_choice(text)
            return text
        if scalar:
            self._check_choice(raw or "null")
        shown = _shown(value, raw)
        one = f"; a list of one is [{shown}]" if isinstance(value, str) and "list" in kinds else ""
        raise ValueError(f"expected {self.expected()}, got {shown}{one}")

    def _check_item(self, item: Any) -> None:
        kinds = _item_kinds(self.annotation)
        for kind in kinds:
            if isinstance(item, TYPES[kind]) and isinstance(item, bool) == (kind == "bool"):
                return
        if kinds:
            expected = " or ".join(KINDS[kind] for kind in kinds)
            raise ValueError(f"expected {expected} for each item, got {_shown(item, None)}")

    def _check_choice(self, text: str) -> None:
        for choice in self.choices:
            # a choice may be a pattern: peft has 'pissa_niter_[number of iters]'
            start, pattern, _ = choice.partition("[")
            if text == choice or (pattern and text.startswith(start)):
                return
        if not self.choices:
            return
        hint = nearest(text, self.choices)
        if hint and len(self.choices) > 8:  # a list of all 41 optimizers would bury the hint
            raise ValueError(f"{quoted(text)} is not one of its {len(self.choices)} choices{hint}")
        raise ValueError(f"{quoted(text)} is not one of {', '.join(self.choices)}{hint}")

    def expected(self) -> str:
        """What the field takes, for an error message: "a whole number or null"."""
        kinds = [kind for kind in self.kinds if kind != "int" or "float" not in self.kinds]
        words = [KINDS[kind] for kind in kinds if kind in KINDS]
        return " or ".join(dict.fromkeys(words))


def trainer_fields(stage: str) -> dict[str, Field]:
    """The fields of a stage's trainer arguments: `TrainingArguments`; for sft, `trl.SFTConfig`."""
    fields = _class_fields("transformers", "training_args.py", "TrainingArguments")
    if stage == "sft":
        fields = (
            fields
            | _class_fields("trl", "trainer/base_config.py", "_BaseConfig")
            | _class_fields("trl", "trainer/sft_config.py", "SFTConfig")
        )
    return fields


def lora_fields() -> dict[str, Field]:
    """The fields of `peft.LoraConfig`."""
    return _class_fields("peft", "tuners/lora/config.py", "LoraConfig")


@cache
def model_types() -> dict[str, str]:
    """Every `model_type` of transformers: its name → the name of its configuration class."""
    return _mapping("CONFIG_MAPPING_NAMES")


def model_fields(model_type: str) -> dict[str, Field]:
    """The fields of a model's configuration class; empty for an unknown `model_type`."""
    if model_type not in model_types():
        return {}
    module = _mapping("SPECIAL_MODEL_TYPE_TO_MODULE_NAME").get(model_type, model_type)
    folder = _package("transformers") / "models" / module.replace("-", "_")
    for path in folder.glob("configuration_*.py"):
        for node in _parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name == model_types()[model_type]:
                return _annotated(node, {})
    return {}


def _mapping(name: str) -> dict[str, str]:
    """A mapping in transformers' models/auto, where it is written as a list of pairs."""
    for node in _parse(_package("transformers") / "models/auto/auto_mappings.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return dict(ast.literal_eval(node.value.args[0]))
    raise LookupError(f"transformers has no {name}")


def _shown(value: Any, raw: str | None) -> str:
    if value is None:
        return raw or "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        is_number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value, re.IGNORECASE)
        return quoted(value) + " (remove the quotes)" * bool(is_number)
    return raw or str(value).lower()


@cache
def _annotation_kinds(annotation: str) -> tuple[str, ...]:
    """`Optional[Union[list[str], str]]` and `list[str] | str | None` → ("list", "str", "None")."""
    return tuple(dict.fromkeys(_types(ast.parse(annotation, mode="eval").body)))


@cache
def _item_kinds(annotation: str) -> tuple[str, ...]:
    """`list[str] | str` → ("str",); empty if no list declares the type of its items."""
    lists = [
        node
        for node in ast.walk(ast.parse(annotation, mode="eval"))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "list"
    ]
    return tuple(dict.fromkeys(name for node in lists for name in _types(node.slice)))


def _types(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp):
        return _types(node.left) + _types(node.right)
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer in ("Optional", "Union"):
            types = [name for part in inner for name in _types(part)]
            return [*types, "None"] if outer == "Optional" else types
        if outer == "Literal":
            return [type(ast.literal_eval(part)).__name__ for part in inner]
        return [outer]
    name = ast.unparse(node)
    if name in KINDS:
        return [name]
    # in YAML an enum is text, and a configuration class a mapping
    return ["str"] if name in _enums() else ["dict"] if name[:1].isupper() else []


@cache
def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0])


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _class_fields(package: str, file: str, class_name: str) -> dict[str, Field]:
    tree = _parse(_package(package) / file)
    enums = _enums()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return _annotated(node, enums)
    raise LookupError(f"{package}/{file} has no class {class_name}")


@cache
def _enums() -> dict[str, tuple[str, ...]]:
    """The enums that TrainingArguments uses: name → values."""
    enums = {}
    for file in ("trainer_utils.py", "training_args.py", "trainer_optimizer.py", "debug_utils.py"):
        path = _package("transformers") / file
        for node in _parse(path).body if path.exists() else ():
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith("Enum") for base in node.bases
            ):
                values = [
                    item.value.value
                    for item in node.body
                    if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
                ]
                enums[node.name] = tuple(str(value) for value in values)
    return enums


def _annotated(node: ast.ClassDef, enums: dict[str, tuple[str, ...]]) -> dict[str, Field]:
    """The annotated fields of a class, with the choices from an enum, a Literal or metadata."""
    fields = {}
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        annotation = ast.unparse(item.annotation)
        if annotation.startswith("ClassVar"):
            continue
        choices: tuple[str, ...] = ()
        for name, values in enums.items():
            if re.search(rf"\b{name}\b", annotation):
                choices = values
        if "Literal[" in annotation:
            choices = tuple(
                part.value
                for part in ast.walk(item.annotation)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
        for keyword in getattr(item.value, "keywords", ()):
            if keyword.arg == "metadata":
                choices = _metadata_choices(keyword.value) or choices
        fields[item.target.id] = Field(annotation, choices)
    return fields


def _metadata_choices(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices":
                if isinstance(value, ast.List):
                    return tuple(str(ast.literal_eval(item)) for item in value.elts)
                if ast.unparse(value) == "trainer_log_levels.keys()":
                    return (*_log_levels(), "passive")
    return ()


def _log_levels() -> tuple[str, ...]:
    for node in _parse(_package("transformers") / "utils/logging.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "log_levels":
            return tuple(ast.literal_eval(key) for key in node.value.keys)
    raise LookupError("transformers has no log_levels")
