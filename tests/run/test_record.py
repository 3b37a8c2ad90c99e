"""What may change between two commands, and what is said of it."""

import pytest

from hfsft.recipe.schema import stage_fields
from hfsft.run.record import FREE_KEYS, changed_keys, going_on_line

BEFORE = {
    "seed": 42,
    "sft": {"learning_rate": 1e-3, "save_steps": 0.25, "per_device_train_batch_size": 2},
}


def test_every_free_key_is_a_setting():
    assert set(stage_fields("sft")) >= FREE_KEYS


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"save_steps": 10}, "sft: going on with other save_steps"),
        ({"save_steps": 10, "logging_steps": 1}, "sft: going on with other logging_steps, save_st"),
        ({"per_device_train_batch_size": 1}, "size; sums of other parts are rounded otherwise"),
    ],
)
def test_what_may_change_is_said(make_stage, changes, says):
    now = BEFORE | {"sft": BEFORE["sft"] | changes}
    assert changed_keys(BEFORE, now) == []
    line = going_on_line(make_stage(), BEFORE, now)
    assert (line is None) if says is None else says in line


def test_what_may_not_change_is_no_free_key(make_stage):
    now = BEFORE | {"seed": 7, "sft": BEFORE["sft"] | {"learning_rate": 1.0, "save_steps": 1}}
    assert changed_keys(BEFORE, now) == ["seed", "sft.learning_rate"]
    assert changed_keys(BEFORE, now, free=True) == ["sft.save_steps"]
