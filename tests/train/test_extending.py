"""A finished run that is given more steps, against one that had them from the start."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from faults import RECIPE, STEPS, bits, timeless

from hfsft import base, sft
from hfsft.errors import Interrupted, RecipeError
from hfsft.run.manifest import checkpoints, step_of
from hfsft.train.arguments import arguments
from hfsft.train.schedule import (
    decay_start,
    scaled_notice,
    scheduler_settings,
    shared_steps,
    warmup_steps,
)

STABLE = ("--lr_scheduler_type", "warmup_stable_decay")


@pytest.mark.parametrize(
    ("settings", "before", "now", "shared"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, 200, 400, 160),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 10}, 200, 300, 160),
        # warming up over another number of steps, the two part at once
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.1}, 200, 400, 0),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 50},
            },
            400,
            200,
            150,
        ),
        ({"lr_scheduler_type": "constant"}, 200, 400, 200),
        ({"lr_scheduler_type": "linear"}, 200, 400, 0),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 20}, 200, 400, 20),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, 200, 400, -1),
    ],
)
def test_steps_that_two_runs_share(make_stage, settings, before, now, shared):
    assert shared_steps(make_stage(trainer=settings), before, now) == shared


def test_a_share_of_decaying_steps_becomes_their_number(make_stage):
    stage = make_stage(trainer={"lr_scheduler_type": "warmup_stable_decay"})
    assert scheduler_settings(stage, 200) == {"num_decay_steps": 40}
    assert decay_start(stage, 200) == 160
    given = {"num_decay_steps": 0.5, "decay_type": "linear"}
    stage.trainer["lr_scheduler_kwargs"] = given
    assert scheduler_settings(stage, 200) == {"num_decay_steps": 100, "decay_type": "linear"}
    assert scaled_notice(stage, 200) is None


def test_warmup_and_decay_that_do_not_fit_are_scaled(make_stage):
    trainer = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 150}
    stage = make_stage(trainer=trainer | {"lr_scheduler_kwargs": {"num_decay_steps": 0.5}})
    assert scheduler_settings(stage, 200) == {"num_decay_steps": 80}
    assert (warmup_steps(stage, 200), decay_start(stage, 200)) == (120, 120)
    assert scaled_notice(stage, 200) == (
        "sft: warmup_steps 150 and num_decay_steps 100 are more than max_steps 200; "
        "scaled to 120 and 80"
    )
    short = make_stage(trainer=trainer | {"warmup_steps": 10})
    assert warmup_steps(short, 3) == 2 and scheduler_settings(short, 3) == {"num_decay_steps": 1}
    rates = arguments(short, [0] * 40, 1)
    assert rates.warmup_steps == 10 and rates.max_steps == 40


def test_another_schedule_has_no_decaying_steps(make_stage):
    assert decay_start(make_stage(trainer={"lr_scheduler_type": "linear"}), 200) is None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The fault harness's recipe, its base trained; sft starts from there."""
    folder = tmp_path_factory.mktemp("going-on")
    path = folder / "longer.yaml"
    settings = RECIPE["sft"] | {"model_name_or_path": "base"}
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder), "sft": settings}))
    base.main(str(path), "--quiet")
    return str(path)


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # advice at the shared steps was given for another end
    return [timeless({key: line[key] for key in line.keys() - {"advice"}}) for line in lines]


def test_more_steps_end_where_a_longer_run_from_scratch_does(recipe, tmp_path, capsys):
    # of 6 steps the last 2 decay; validation and saving at the same steps in both
    sft.main(recipe, "--output_dir", str(tmp_path / "a"), "--max_steps", "4", *STABLE)
    folder = tmp_path / "a" / "start" / "sft"
    steps = [step_of(path) for path in checkpoints(folder / "checkpoints")]
    assert steps == [4, 3]
    finished = (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    sft.main(recipe, "--output_dir", str(tmp_path / "a"), *STABLE)
    aside = folder.with_name("sft.old-1")
    assert (
        f"sft: resuming from step 3, up to {STEPS}; what was trained to step 4 is now in {aside}\n"
        in capsys.readouterr().out
    )
    assert (aside / "model.safetensors").read_bytes() == finished
    sft.main(recipe, "--output_dir", str(tmp_path / "b"), "--quiet", *STABLE)
    scratch = tmp_path / "b" / "start" / "sft"
    found, expected = bits(folder), bits(scratch)
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert (
        found[f"checkpoints/checkpoint-{STEPS}/optimizer.pt"]
        == expected[f"checkpoints/checkpoint-{STEPS}/optimizer.pt"]
    )
    assert log_of(folder) == log_of(scratch)
    assert json.loads((folder / "stage.json").read_text())["steps"] == STEPS
    capsys.readouterr()
    sft.main(recipe, "--output_dir", str(tmp_path / "a"), *STABLE)
    assert "sft: finished already" in capsys.readouterr().out


def test_a_copied_run_resumes_and_extends(recipe, tmp_path, capsys):
    run = Path(recipe).parent / "start"
    shutil.copytree(run, tmp_path / "a" / "start")
    place = ("--output_dir", str(tmp_path / "a"), "--max_steps", "4", *STABLE)
    sft.main(recipe, *place)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = ("--output_dir", str(tmp_path / "b"), *STABLE)
    capsys.readouterr()
    sft.main(recipe, *moved, "--max_steps", "4")
    assert "sft: finished already" in capsys.readouterr().out
    # the same model under its path, elsewhere
    shutil.copytree(run / "base", tmp_path / "model")
    sft.main(recipe, *moved, "--model_name_or_path", str(tmp_path / "model"))
    assert f"sft: resuming from step 3, up to {STEPS}" in capsys.readouterr().out
    other = tmp_path / "model" / "config.json"
    other.write_text(other.read_text().replace('"hidden_act"', '"other": 1, "hidden_act"'))
    with pytest.raises(RecipeError, match="other settings: the model it starts from\n"):
        sft.main(recipe, *moved, "--model_name_or_path", str(tmp_path / "model"))


def test_another_schedule_says_why_not_and_touches_nothing(recipe, tmp_path):
    place = ("--output_dir", str(tmp_path), "--quiet")
    sft.main(recipe, *place, "--max_steps", "2")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(
        RecipeError,
        match=r"was started with max_steps 2 and cannot resume to 6: with lr_scheduler_type "
        r"linear, another max_steps changes the learning rate of every step\n  lr_scheduler_type",
    ):
        sft.main(recipe, *place)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_constant_rate_resumes_from_the_end(recipe, tmp_path):
    constant = ("--lr_scheduler_type", "constant", "--quiet")
    sft.main(recipe, "--output_dir", str(tmp_path / "a"), "--max_steps", "3", *constant)
    sft.main(recipe, "--output_dir", str(tmp_path / "a"), *constant)
    sft.main(recipe, "--output_dir", str(tmp_path / "b"), *constant)
    one, other = (tmp_path / name / "start" / "sft" for name in "ab")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    logs = ([line for line in log_of(run) if "eval_loss" in line] for run in (one, other))
    assert next(logs) == next(logs)


def test_killed_between_the_two_renames_it_is_found_again(recipe, tmp_path, monkeypatch):
    place = ("--output_dir", str(tmp_path), "--quiet", *STABLE)
    sft.main(recipe, *place, "--max_steps", "4")
    folder, rename = tmp_path / "start" / "sft", Path.rename

    def killed(path, target):
        if path.name == "sft.longer":
            raise Interrupted("killed", 9)
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Interrupted):
            sft.main(recipe, *place)
    assert not folder.exists()
    sft.main(recipe, *place)
    assert step_of(checkpoints(folder / "checkpoints")[0]) == STEPS
    assert log_of(folder)[-1]["step"] == STEPS and folder.with_name("sft.old-1").is_dir()


def test_without_checkpoints_a_finished_stage_stays_as_it_is(recipe, tmp_path):
    place = ("--output_dir", str(tmp_path), "--quiet", *STABLE, "--save_strategy", "no")
    sft.main(recipe, *place, "--max_steps", "3")
    before = (tmp_path / "start" / "sft" / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="no checkpoint of the first 2 steps is left"):
        sft.main(recipe, *place)
    assert (tmp_path / "start" / "sft" / "model.safetensors").read_bytes() == before


def test_a_killed_run_past_its_decay_resumes_from_before_it(recipe, tmp_path, capsys):
    place = ("--output_dir", str(tmp_path), *STABLE)
    sft.main(recipe, *place, "--max_steps", "4")
    folder = tmp_path / "start" / "sft"
    record = json.loads((folder / "stage.json").read_text())
    for key in ("steps", "seconds"):  # what a kill leaves untold
        del record[key]
    (folder / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    sft.main(recipe, *place)
    assert (
        "resuming from step 3, up to 6; what was trained to step 4 is now in"
        in capsys.readouterr().out
    )
    assert step_of(checkpoints(folder / "checkpoints")[0]) == STEPS
