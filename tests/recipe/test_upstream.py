"""Settings parsed from source have the names, types and choices of the imported classes."""

import dataclasses
import enum
import types
import typing

import pytest
import torch
from peft import LoraConfig, PeftConfig
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    TrainingArguments,
)
from trl import SFTConfig

from hfsft.errors import nearest, quoted
from hfsft.recipe.upstream import Field, lora_fields, model_fields, model_types, trainer_fields

CLASSES = [
    pytest.param(trainer_fields("base"), TrainingArguments, None, id="TrainingArguments"),
    pytest.param(trainer_fields("sft"), SFTConfig, None, id="SFTConfig"),
    pytest.param(lora_fields(), LoraConfig, PeftConfig, id="LoraConfig"),
    pytest.param(model_fields("llama"), LlamaConfig, PreTrainedConfig, id="LlamaConfig"),
    pytest.param(model_fields("nanochat"), NanoChatConfig, PreTrainedConfig, id="NanoChatConfig"),
    pytest.param(model_fields("gemma3_text"), Gemma3TextConfig, PreTrainedConfig, id="Gemma3Text"),
    pytest.param(model_fields("qwen2_moe"), Qwen2MoeConfig, PreTrainedConfig, id="Qwen2Moe"),
]


def field_names(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def parts(hint: object) -> list[object]:
    """The types in a union; any other type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for arm in typing.get_args(hint) for part in parts(arm)]
    return [hint]


def kind(hint: object) -> str:
    """A type's name in `Field.kinds`."""
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return type(typing.get_args(hint)[0]).__name__
    hint = typing.get_origin(hint) or hint
    if hint in (int, float, bool, str, dict, list, tuple):
        return hint.__name__
    return "str" if issubclass(hint, enum.Enum) else "dict"


@pytest.mark.parametrize(("fields", "config_class", "base"), CLASSES)
def test_names_are_those_of_the_class(fields, config_class, base):
    names = field_names(config_class)
    assert set(fields) <= names
    assert names - set(fields) <= (field_names(base) if base else set())


@pytest.mark.parametrize(("fields", "config_class", "base"), CLASSES)
def test_kinds_are_those_of_the_class(fields, config_class, base):
    hints = typing.get_type_hints(config_class, localns={"torch": torch})
    real = {name: {kind(part) for part in parts(hints[name])} for name in fields}
    assert {name: set(field.kinds) for name, field in fields.items()} == real


@pytest.mark.parametrize(("fields", "config_class", "base"), CLASSES[:3])
def test_choices_are_those_of_the_enums(fields, config_class, base):
    hints = typing.get_type_hints(config_class)
    for name, field in fields.items():
        for part in parts(hints[name]):
            if typing.get_origin(part) is typing.Literal:
                choices = tuple(value for value in typing.get_args(part) if value is not False)
                assert field.choices == choices, name
            elif isinstance(part, type) and issubclass(part, enum.Enum):
                assert field.choices == tuple(choice.value for choice in part), name


def test_choices_in_metadata():
    levels = next(f for f in dataclasses.fields(SFTConfig) if f.name == "log_level").metadata
    assert trainer_fields("sft")["log_level"].choices == tuple(levels["choices"])


def test_every_model_type_has_fields():
    assert {name for name in model_types() if not model_fields(name)} == set()
    assert "auto" not in model_types()


@pytest.mark.parametrize("name", ["", "*", "auto", "LLAMA", "llama/../gpt2", "/etc", "../../etc"])
def test_an_unknown_model_type_has_no_fields(name):
    assert model_fields(name) == {}


ACCEPTED = [
    ("int", 5, "5", 5),
    ("int | None", None, "null", None),
    ("float", 5, "5", 5.0),
    ("float", 1e-3, "1e-3", 1e-3),
    ("int | float", 5, "5", 5),
    ("bool", False, "false", False),
    ("bool", "no", "no", False),
    ("bool", "On", "On", True),
    ("bool | str", "always", "always", "always"),
    ("str", "no", "no", "no"),
    ("str", 10, "010", "010"),  # a revision, as written
    ("str", True, "true", "true"),
    ("list[str] | str", ["a", "b"], None, ["a", "b"]),
    ("list[str] | str", "a", "a", "a"),
    ("Optional[Union[list[int], int]]", [0, 1], None, [0, 1]),
    ("list", [1, "a", None], None, [1, "a", None]),
    ("dict[str, Any] | None", {"a": 1}, None, {"a": 1}),
]
REFUSED = [
    ("int", 12.5, "12.5", "expected a whole number, got 12.5"),
    ("int", 2.0, "2.0", "expected a whole number, got 2.0"),
    ("int", "ten", "ten", "expected a whole number, got 'ten'"),
    ("int", "5", "5", "expected a whole number, got '5' (remove the quotes)"),
    ("int", True, "true", "expected a whole number, got true"),
    ("int", [1], None, "expected a whole number, got a list"),
    ("int", {}, None, "expected a whole number, got a mapping"),
    ("int", None, "", "expected a whole number, got nothing"),
    ("int | None", "~~", "~~", "expected a whole number or null, got '~~'"),
    ("int | float", "x", "x", "expected a number, got 'x'"),
    ("float", float("nan"), ".nan", "expected a finite number, got .nan"),
    ("float", float("-inf"), "-.inf", "expected a finite number, got -.inf"),
    ("int", 10**400, "1000", "expected a finite number, got 1000"),
    ("bool", 1, "1", "expected true or false, got 1"),
    ("bool", "maybe", "maybe", "expected true or false, got 'maybe'"),
    ("str", None, "null", "expected text, got null"),
    ("str", "a\0b", "a\0b", r"'a\x00b' contains a NUL character"),
    ("list[str] | str", 5, "5", "expected a list or text, got 5"),
    ("list[str] | str", [1], None, "expected text for each item, got 1"),
    ("list[int]", [True], None, "expected a whole number for each item, got true"),
    ("dict | str | None", False, "false", "expected a mapping or text or null, got false"),
]


@pytest.mark.parametrize(("annotation", "value", "raw", "expected"), ACCEPTED)
def test_check_accepts(annotation, value, raw, expected):
    checked = Field(annotation).check(value, raw)
    assert (type(checked), checked) == (type(expected), expected)


@pytest.mark.parametrize(("annotation", "value", "raw", "message"), REFUSED)
def test_check_refuses(annotation, value, raw, message):
    with pytest.raises(ValueError) as refused:
        Field(annotation).check(value, raw)
    assert str(refused.value) == message


def test_check_of_choices():
    few = Field("str", ("no", "steps", "niter_[number]"))
    assert [few.check(word, word) for word in ("no", "niter_16")] == ["no", "niter_16"]
    with pytest.raises(ValueError, match=r"^'step' is not one of no, steps, .*mean 'steps'\?$"):
        few.check("step", "step")
    with pytest.raises(ValueError, match=r"^'null' is not one of no, steps"):
        few.check(None, "null")
    optim = trainer_fields("sft")["optim"]
    assert optim.check("adamw_bnb_8bit", "adamw_bnb_8bit") == "adamw_bnb_8bit"
    with pytest.raises(ValueError, match=r"one of its \d+ choices; did you mean 'adamw_torch'\?$"):
        optim.check("adamw", "adamw")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("max_step", "; did you mean 'max_steps'?"),
        ("max-steps", "; did you mean 'max_steps'?"),
        ("Max Steps", "; did you mean 'max_steps'?"),
        ("trian", "; did you mean 'train'?"),
        ("max", "; did you mean 'max_steps'?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_nearest(word, hint):
    assert nearest(word, ["max_steps", "train", "data"]) == hint


def test_quoted_is_one_short_line():
    assert quoted("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert quoted("x" * 5000) == f"'{'x' * 57}...'"
