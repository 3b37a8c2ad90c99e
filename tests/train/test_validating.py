"""What a stage forgets: the loss on general data at every validation, and the line about it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hfsft import sft
from hfsft.data.replay import CHAT, TEXT, load_general
from hfsft.recipe.loading import load_recipe
from hfsft.report.report import report_text, summary_text
from hfsft.run.results import forgetting, general_changes, read_run
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.train.trainer import SFTStageTrainer

STEPS = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory, make_model, tokenizer) -> Path:
    """A recipe with `replay`, and the model it starts from."""
    folder = tmp_path_factory.mktemp("replay")
    make_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {
        "name": "tiny",
        "output_dir": str(folder),
        "sample_prompts": [],
        "sft": {
            "model_name_or_path": str(folder / "model"),
            "data": [{"path": "simple_spelling", "rows": 60}],
            "held_out": 8,
            "examples_per_step": 8,
            "max_length": 64,
            "max_steps": STEPS,
            "eval_steps": 2,
            "save_steps": 1,
            "learning_rate": 3e-3,
            "optim": "adamw_torch",
            "eval_budget": 1,
            "replay": {"path": "small_talk", "rows": 60, "share": 0, "held_out": 10},
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    sft.main(str(folder / "tiny.yaml"), "--quiet")
    return folder


def validations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_each_document_has_the_loss_that_the_model_gives_it(start):
    recipe = load_recipe(str(start / "tiny.yaml"), stage="sft")
    tokenizer = load_tokenizer(str(start / "model"))
    lines = validations(start / "tiny" / "sft")
    assert [line["step"] for line in lines] == [0, 2, STEPS]
    general = load_general(recipe.sft, tokenizer)
    for line, folder in ((lines[0], start / "model"), (lines[-1], start / "tiny" / "sft")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name in (CHAT, TEXT):
            rows = [row for row in general if row["source"] == name]
            assert len(rows) == len(line["general"][name]["losses"]) == 10
            for number, row in enumerate(rows):
                ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
                tokens = int((labels[:, 1:] != -100).sum())
                with torch.no_grad():
                    loss = model(input_ids=ids, labels=labels).loss.item() * tokens
                assert line["general"][name]["tokens"][number] == tokens
                assert line["general"][name]["losses"][number] == pytest.approx(loss, rel=1e-4)


def test_an_interrupted_run_measures_the_same(start, tmp_path, monkeypatch):
    init = SFTStageTrainer.__init__

    def until_step_3(self, *args, **kwargs):
        init(self, *args, **kwargs)
        train = self.training_step
        self.training_step = lambda *its, **named: (
            1 / (self.state.global_step < 3) and train(*its, **named)
        )

    recipe = (str(start / "tiny.yaml"), "--output_dir", str(tmp_path), "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(SFTStageTrainer, "__init__", until_step_3)
        with pytest.raises(ZeroDivisionError):
            sft.main(*recipe)
    assert len(validations(tmp_path / "tiny" / "sft")) == 2
    sft.main(*recipe)
    assert validations(tmp_path / "tiny" / "sft") == validations(start / "tiny" / "sft")


def test_the_report_says_what_was_forgotten(start):
    run = read_run(start / "tiny")
    changes = run["stages"]["sft"]["general"]
    assert list(changes) == [CHAT, TEXT]
    for name, one in changes.items():
        first, *_, last = [line["general"][name] for line in validations(start / "tiny" / "sft")]
        moved = sum(last["losses"]) - sum(first["losses"])
        assert one["change"] == pytest.approx(moved / sum(first["tokens"]))
        assert one["after"] - one["before"] == pytest.approx(one["change"])
        assert one["low"] < one["change"] < one["high"]
    line = forgetting(changes)
    assert f"- **Forgetting:** loss on general data, in nats per token: sft, {line}." in (
        summary_text(run)
    )
    text = report_text(run, {})
    assert "## Forgetting" in text and f"sft: {line}." in text
    assert f"| sft, general text | {changes[TEXT]['before']:.3f} |" in text


def lines_of(before: list[float], after: list[float]) -> list[dict]:
    """Two validations of four documents of ten tokens."""
    return [
        {"step": step, "general": {TEXT: {"losses": losses, "tokens": [10] * 4}}}
        for step, losses in enumerate((before, after))
    ]


def test_only_what_exceeds_the_noise_is_called_forgetting():
    hard_and_easy = [10.0, 30.0, 20.0, 40.0]
    worse = general_changes(lines_of(hard_and_easy, [12.0, 32.0, 21.9, 42.1]))
    # the documents differ far more than they moved: the interval is that of the paired change
    assert worse[TEXT]["low"] == pytest.approx(0.2 - 1.959964 * 0.0040825, abs=1e-5)
    assert forgetting(worse) == ("it forgot: general text 2.500 → 2.700 (+0.200, +0.192 to +0.208)")
    noise = general_changes(lines_of(hard_and_easy, [14.0, 26.0, 25.0, 38.0]))
    assert forgetting(noise).startswith("no forgetting seen: general text 2.500 → 2.575 (+0.075, -")
    better = general_changes(lines_of(hard_and_easy, [9.0, 29.0, 19.0, 39.2]))
    assert forgetting(better).startswith("no forgetting seen: general text 2.500 → 2.405 (-0.095")
    both = worse | {CHAT: better[TEXT]}
    assert CHAT not in forgetting(both)
    assert general_changes(lines_of(hard_and_easy, hard_and_easy)[:1]) == {}
    assert general_changes([{"step": 0}, {"step": 3}]) == {}
