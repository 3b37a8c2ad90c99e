"""Which settings may change between an interrupted run and its resume, and what is printed then."""

import pytest

from hfsft.run.record import changed_keys, resume_notice

BEFORE = {
    "seed": 42,
    "sft": {"learning_rate": 1e-3, "save_steps": 0.25, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"save_steps": 10}, "sft: resuming with changed save_steps"),
        (
            {"save_steps": 10, "logging_steps": 1},
            "sft: resuming with changed logging_steps, save_st",
        ),
        ({"per_device_train_batch_size": 1}, "size; sums are grouped differently, so the last"),
    ],
)
def test_changes_that_are_allowed_are_printed(make_stage, changes, expected):
    now = BEFORE | {"sft": BEFORE["sft"] | changes}
    assert changed_keys(BEFORE, now) == []
    line = resume_notice(make_stage(), BEFORE, now)
    assert (line is None) if expected is None else expected in line


def test_other_changes_are_not_allowed():
    now = BEFORE | {"seed": 7, "sft": BEFORE["sft"] | {"learning_rate": 1.0, "save_steps": 1}}
    assert changed_keys(BEFORE, now) == ["seed", "sft.learning_rate"]
    assert changed_keys(BEFORE, now, free=True) == ["sft.save_steps"]
