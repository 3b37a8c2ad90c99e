"""A key is declared once: one more field of `Stage` is checked, defaulted, documented, resumed."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from recipe_texts import BASE, SFT, load, message

from hfsft.recipe import loading, reference, sections
from hfsft.recipe.key import FIXED, FREE, ROUNDED, STAGES, UNSET, declared_keys, key
from hfsft.recipe.schema import Source, Stage
from hfsft.recipe.upstream import lora_fields, model_fields, trainer_fields


@dataclass(frozen=True)
class PatientStage(Stage):
    """A stage with one more key."""

    patience: int = key(
        "validations without progress",
        stages=("sft",),
        default=3,
        low=1,
        high=9,
        on_resume=FREE,
    )


@pytest.fixture
def one_more_key(monkeypatch) -> None:
    """Put `PatientStage` in the place of `Stage`, as if its field were declared there."""
    for module in (sections, loading, reference):
        monkeypatch.setattr(module, "Stage", PatientStage)


@pytest.mark.usefixtures("one_more_key")
def test_a_new_key_is_loaded_and_checked():
    assert load(SFT).sft.patience == 3
    assert load(SFT + "  patience: 5\n").sft.patience == 5
    assert load(SFT, "--patience", "5").sft.patience == 5
    assert "patience" not in load(SFT, "--patience", "5").sft.trainer
    assert "r.yaml:4: sft.patience: 10 is not possible: it must be at most 9" in message(
        SFT + "  patience: 10\n"
    )
    assert "--patience: sft.patience: 0 is not possible: it must be at least 1" in message(
        SFT, "--patience", "0"
    )
    assert "r.yaml:4: sft.patience: expected a whole number, got 2.5" in message(
        SFT + "  patience: 2.5\n"
    )
    assert "did you mean 'patience'?" in message(SFT + "  patienc: 5\n")
    assert "r.yaml:6: unknown key 'patience' in base; it belongs in sft" in message(
        BASE + "  patience: 5\n", stage="base"
    )


@pytest.mark.usefixtures("one_more_key")
def test_a_new_key_is_documented_and_may_change_on_resume():
    row = "| `patience` | - | - | 3 | a whole number, 1 to 9 | yes | validations without progress |"
    assert row in reference.page().splitlines()
    assert sections.on_resume("patience") == FREE


def test_a_new_key_with_a_default_stops_no_older_run_from_resuming(one_more_key):
    assert "patience" not in load(SFT).resolved["sft"]
    assert load(SFT, "--patience", "5").resolved["sft"]["patience"] == 5


def test_without_the_declaration_the_key_is_unknown():
    assert "r.yaml:4: unknown key 'patience' in sft" in message(SFT + "  patience: 5\n")


def test_declared_keys_of_upstream_exist_there():
    assert set(sections.UPSTREAM) <= set(trainer_fields("sft"))
    assert set(sections.LORA) <= set(lora_fields())
    assert set(sections.MODEL_CONFIG) <= set(model_fields("llama"))
    assert not set(sections.UPSTREAM) & set(declared_keys(Stage))


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_values_that_their_keys_take(stage):
    fields = sections.stage_fields(stage)
    for name, value in sections.stage_defaults(stage).items():
        assert fields[name].check(value) == value, name
    for name, one in declared_keys(Stage).items():
        if stage in one.stages and one.default not in (UNSET, None):
            assert one.check(one.default) == one.default, name


def test_top_level_and_source_defaults_are_values_that_their_keys_take():
    for one in [*sections.TOP.values(), *sections.TOKENIZER.values()]:
        if one.default is not UNSET:
            assert one.check(one.default) == one.default
    assert declared_keys(Source)["columns"].kinds == ("dict",)
    assert Source("x").columns == {}


def test_settings_that_only_the_result_depends_on_are_fixed():
    free = {name for name in sections.stage_fields("sft") if sections.on_resume(name) != FIXED}
    assert {"save_steps", "logging_steps", "gradient_checkpointing", "memory_limit"} <= free
    assert not {"data", "learning_rate", "max_length", "held_out", "optim", "lora"} & free
    rounded = [name for name in sections.UPSTREAM if sections.on_resume(name) == ROUNDED]
    assert rounded == ["per_device_train_batch_size"]


def test_a_default_is_no_place_to_write_to():
    """Loading edits its tree: a second recipe must not see it."""
    first = load(SFT, "--sample_prompts.0", "Hi", "--tokenizer.chat_template", "chatml")
    second = load(SFT)
    assert first.sample_prompts[0] == "Hi"
    assert second.sample_prompts[0] == "Who are you?"
    assert second.tokenizer == {}
    assert Path("r.yaml").read_text() == SFT
