"""The three stages, run in-process on a tiny real model: what they write, and what they repeat."""

import gc
import json
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from faults import timeless
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline

from hfsft import base, mid, sft
from hfsft.errors import Interrupted, RecipeError
from hfsft.train.stage import prepare_wandb, set_up_libraries
from hfsft.train.trainer import SFTStageTrainer, StageTrainer

MODEL_FILES = {
    "README.md",
    "chat_template.jinja",
    "checkpoints",
    "config.json",
    "data.json",
    "manifest.json",
    "generation_config.json",
    "metrics.jsonl",
    "model.safetensors",
    "rejected.jsonl",
    "samples.jsonl",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "validation.jsonl",
}
RECIPE = {
    "name": "tiny",
    "model": {"depth": 2, "vocab_size": 400, "max_position_embeddings": 96},
    "tokenizer": {"train": True},
    "base": {
        "data": [{"path": "facts", "rows": 300}],
        "held_out": 40,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 256,
        "max_steps": 3,
        "logging_steps": 1,
    },
    "mid": {
        "data": [{"path": "small_talk", "rows": 60}, {"path": "identity", "rows": 20}],
        "held_out": 8,
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 384,
        "max_steps": 3,
        "logging_steps": 1,
    },
    "sft": {
        "data": [{"path": "simple_spelling", "rows": 60}],
        "held_out": 8,
        "examples_per_step": 8,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The tiny recipe's file, with all three stages trained."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder / "runs")}))
    for stage in (base, mid, sft):
        stage.main(str(path))
    return str(path)


@pytest.fixture
def run(recipe) -> Path:
    """The folder of the finished run."""
    return Path(recipe).parent / "runs" / "tiny"


def read_json(path: Path):
    return json.loads(path.read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_run_folder_holds_exactly_these_files(run):
    assert {path.name for path in run.iterdir()} == {
        "base",
        "mid",
        "sft",
        "recipe.yaml",
        "tokenizer",
    }
    for stage in ("base", "mid", "sft"):
        assert {path.name for path in (run / stage).iterdir()} == MODEL_FILES


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_record_says_what_happened(run, stage):
    record = read_json(run / stage / "stage.json")
    steps = RECIPE[stage]["max_steps"]
    assert record["status"] == "finished"
    assert record["steps"] == record["max_steps"] == steps
    assert record["parameters"] == record["trained_parameters"] == 2 * 400 * 128 + 2 * 12 * 128**2
    assert record["precision"] == "fp32"
    assert record["device"].startswith("cpu")
    assert record["tokens"] > 0 and record["seconds"] > 0 and record["peak_memory_bytes"] > 2**20
    assert record["eval_loss"] < record["eval_loss_before"]
    assert set(record["versions"]) >= {"hfsft", "torch", "transformers", "trl", "accelerate"}
    start = {"base": None, "mid": str(run / "base"), "sft": str(run / "mid")}[stage]
    assert record["lineage"]["model"] == start


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_max_steps_are_optimizer_updates(run, stage):
    steps = RECIPE[stage]["max_steps"]
    checkpoint = run / stage / "checkpoints" / f"checkpoint-{steps}"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {int(parameter["step"]) for parameter in state.values()} == {steps}
    assert read_json(checkpoint / "trainer_state.json")["global_step"] == steps
    assert [line["step"] for line in metrics(run / stage) if "loss" in line] == list(
        range(1, steps + 1)
    )


def test_base_step_has_its_tokens(run):
    record = read_json(run / "base" / "stage.json")
    assert record["examples_per_step"] == 4  # 256 tokens in rows of 64
    # rows are filled best-fit, no fact is cut
    assert 0.9 * 3 * 256 < record["tokens"] <= 3 * 256


def test_sft_step_has_its_examples_whatever_the_device_batch(recipe, run, tmp_path):
    assert read_json(run / "sft" / "stage.json")["examples"] == 4 * 8
    # 8-bit states would round apart what the sums' order differs by
    place = ("--output_dir", str(tmp_path), "--optim", "adamw_torch", "--quiet")
    for batch in ("2", "8"):
        sft.main(recipe, *place, "--name", batch, "--device_batch_size", batch)
    lines = [metrics(tmp_path / batch / "sft") for batch in ("2", "8")]
    for two, eight in zip(*lines, strict=True):
        assert two["tokens"] == eight["tokens"]
        key = "loss" if "loss" in two else "eval_loss"
        assert two[key] == pytest.approx(eight[key], rel=1e-5)


def test_optimizer_states_are_8_bit(run):
    checkpoint = run / "sft" / "checkpoints" / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    # bitsandbytes nests its own: two quantized moments for each matrix but the embedding
    moments = [
        tensor
        for parameter in state.values()
        for nested in parameter.values()
        if isinstance(nested, dict)
        for tensor in nested.values()
        if torch.is_tensor(tensor) and tensor.dtype == torch.uint8
    ]
    assert sum(tensor.numel() for tensor in moments) == 2 * (400 * 128 + 2 * 12 * 128**2)


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_a_stranger_reads_the_result(run, stage):
    folder = run / stage
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|assistant_end|>")
    beginning = tokenizer.convert_tokens_to_ids("<|bos|>")  # of another document
    assert model.generation_config.eos_token_id == [end, beginning]
    assert tokenizer.eos_token_id == end
    assert tokenizer.pad_token_id != end
    assert model.config.use_cache is True
    assert model.config.model_type == "nanochat"


def test_pipeline_answers_messages(run):
    chat = pipeline("text-generation", model=str(run / "sft"))
    answer = chat([{"role": "user", "content": "Spell the word: dog"}], max_new_tokens=5)
    turns = answer[0]["generated_text"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert isinstance(turns[1]["content"], str)


def test_validation_before_during_and_after(run):
    assert [line["step"] for line in metrics(run / "sft") if "eval_loss" in line] == [0, 2, 4]
    assert [line["step"] for line in metrics(run / "base") if "eval_loss" in line] == [0, 1, 2, 3]


@pytest.mark.parametrize("stage", [base, mid, sft])
def test_eval_every_minus_one_runs_no_validation(recipe, tmp_path, monkeypatch, stage):
    calls = []
    for trainer in (StageTrainer, SFTStageTrainer):
        monkeypatch.setattr(trainer, "evaluation_loop", lambda self, *a, **k: calls.append(1))
    stage.main(
        recipe, "--output_dir", str(tmp_path), "--eval_every=-1", "--max_steps", "1", "--quiet"
    )
    name = stage.__name__.split(".")[1]
    assert calls == []
    record = read_json(tmp_path / "tiny" / name / "stage.json")
    assert record["status"] == "finished" and record["eval_loss"] is None


def test_recipe_copy_reproduces_the_run_by_itself(run, tmp_path):
    copy = yaml.safe_load((run / "recipe.yaml").read_text())
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(copy | {"output_dir": str(tmp_path)}))
    base.main(str(path), "--quiet")
    assert same(weights(run / "base"), weights(tmp_path / "tiny" / "base"))


def test_the_same_command_again_does_nothing(recipe, run, capsys):
    before = {path: path.stat().st_mtime_ns for path in (run / "sft").rglob("*")}
    sft.main(recipe)
    assert "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (run / "sft").rglob("*")} == before


def test_other_settings_in_the_same_folder_are_refused(recipe, run):
    before = weights(run / "sft")
    with pytest.raises(RecipeError, match=r"sft\.learning_rate \(was 0\.\d+\)\n.*--restart"):
        sft.main(recipe, "--learning_rate", "5e-4")
    assert same(before, weights(run / "sft"))
    sft.main(recipe, "--logging_steps", "2")  # no setting that the result depends on


def test_restart_moves_the_old_stage_aside(recipe, run, tmp_path):
    place = ("--output_dir", str(tmp_path), "--max_steps", "1", "--eval_every=-1", "--quiet")
    sft.main(recipe, *place)
    old = weights(tmp_path / "tiny" / "sft")
    sft.main(recipe, *place, "--learning_rate", "5e-4", "--restart")
    assert same(old, weights(tmp_path / "tiny" / "sft.old-1"))
    assert not same(old, weights(tmp_path / "tiny" / "sft"))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_saves_and_the_same_command_resumes_to_the_bit(
    recipe, run, tmp_path, monkeypatch, number, status
):
    class Send(TrainerCallback):
        """Sends this process the signal during its second step."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    init = SFTStageTrainer.__init__

    def with_signal(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Send())

    place = ("--output_dir", str(tmp_path), "--quiet")
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(SFTStageTrainer, "__init__", with_signal)
        with pytest.raises(Interrupted, match="at step 2 of 4") as caught:
            sft.main(recipe, *place)
    assert caught.value.exit_status == status
    assert signal.getsignal(number) == before
    folder = tmp_path / "tiny" / "sft"
    assert read_json(folder / "stage.json")["status"] == "interrupted"
    assert not (folder / "model.safetensors").exists()
    sft.main(recipe, *place)
    assert same(weights(folder), weights(run / "sft"))
    logs = [[timeless(line) for line in metrics(f)] for f in (folder, run / "sft")]
    assert logs[0] == logs[1]


def test_lora_leaves_a_plain_model_and_its_adapter(recipe, run, tmp_path):
    sft.main(recipe, "--output_dir", str(tmp_path), "--lora.r", "4", "--max_steps", "2", "--quiet")
    folder = tmp_path / "tiny" / "sft"
    assert {path.name for path in folder.iterdir()} == MODEL_FILES | {"adapter"}
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(run / "mid")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(start, str(folder / "adapter"))(ids).logits
        torch.testing.assert_close(plain(ids).logits, adapted, rtol=1e-5, atol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(run / "mid")
        assert not torch.equal(plain(ids).logits, start(ids).logits)
    record = read_json(folder / "stage.json")
    assert 0 < record["trained_parameters"] < record["parameters"] / 5


def test_num_train_epochs_instead_of_steps(recipe, tmp_path):
    sft.main(
        recipe,
        *("--output_dir", str(tmp_path), "--num_train_epochs", "0.5", "--eval_every=-1"),
        *("--sft.max_steps", "null", "--quiet"),
    )
    # 60 rows, none held out: half an epoch is 30 of them, 4 steps of 8
    assert read_json(tmp_path / "tiny" / "sft" / "stage.json")["steps"] == 4


def test_a_missing_earlier_stage_names_the_fix(tmp_path):
    path = tmp_path / "alone.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "runs")}))
    from hfsft.errors import ModelError

    with pytest.raises(ModelError, match=r"does not exist\n.*hfsft mid RECIPE"):
        sft.main(str(path))
    assert not (tmp_path / "runs").exists()


def test_tokens_per_step_that_does_not_divide(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"tokens_per_step: 300 is no multiple of 64.*256"):
        base.main(recipe, "--output_dir", str(tmp_path), "--tokens_per_step", "300")


def test_it_stops_at_a_plateau_if_the_recipe_says_so(recipe, tmp_path, monkeypatch, capsys):
    # so small a learning rate gains nothing
    flat = ("--learning_rate", "1e-9", "--max_steps", "12", "--eval_steps", "1", "--logging_steps")
    place = ("--output_dir", str(tmp_path), *flat, "4", "--lr_scheduler_type", "constant")
    folder = tmp_path / "tiny" / "sft"
    lost = []

    class Break(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if control.should_training_stop and not lost:
                lost.append(state.global_step)
                raise OSError("lost between validation and the end")

    init = SFTStageTrainer.__init__

    def breaking(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Break())

    with monkeypatch.context() as patched:
        patched.setattr(SFTStageTrainer, "__init__", breaking)
        with pytest.raises(OSError, match="lost"):
            sft.main(recipe, *place, "--stop", "plateau")
    assert 3 <= lost[0] < 12
    sft.main(recipe, *place, "--stop", "plateau")
    record = read_json(folder / "stage.json")
    assert (record["status"], record["steps"]) == ("finished", lost[0])
    assert record["stopped_at"] == "plateau" and (folder / "model.safetensors").is_file()
    lines = [line for line in metrics(folder) if "eval_loss" in line]
    assert [line["step"] for line in lines] == list(range(lost[0] + 1))
    assert [line["advice"]["plateau"] for line in lines] == [False] * lost[0] + [True]
    assert f"sft: {lost[0]} steps of 12, at a plateau, " in capsys.readouterr().out
    sft.main(recipe, *place, "--stop", "plateau")
    assert "sft: finished already" in capsys.readouterr().out
    sft.main(recipe, *place, "--name", "on", "--model_name_or_path", str(tmp_path / "tiny" / "sft"))
    assert read_json(tmp_path / "on" / "sft" / "stage.json")["steps"] == 12


def test_wandb_logs_offline_without_an_api_key(make_stage, tmp_path, monkeypatch, capsys):
    stage = make_stage(quiet=False, trainer={"report_to": "wandb"})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    prepare_wandb(stage)
    assert "WANDB_MODE" not in os.environ and os.environ["WANDB_DIR"] == str(stage.folder)
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    prepare_wandb(stage)
    assert "WANDB_MODE" not in os.environ
    (tmp_path / ".netrc").unlink()
    prepare_wandb(stage)
    assert os.environ["WANDB_MODE"] == "offline"
    assert capsys.readouterr().out == (
        "W&B has no API key (`wandb login`): logging offline; `wandb sync` uploads later\n"
    )


def test_what_an_earlier_stage_left_is_not_kept_for_ever(make_stage):
    """A trainer is part of reference cycles, and a frozen cycle is never collected."""

    class Cycle:
        pass

    gc.freeze()  # as the earlier stage did when it began
    left = Cycle()
    left.itself = left
    reference = weakref.ref(left)
    del left
    gc.disable()  # as in `run_main`
    set_up_libraries(make_stage())
    assert reference() is None and gc.isenabled()
