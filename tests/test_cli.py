"""The command line, as processes where a process is the point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from hfsft.errors import HfsftError, Interrupted
from hfsft.process import run_main

BIN = Path(sys.executable).parent
RECIPE = {
    "name": "tiny",
    "output_dir": "runs",
    "model": {"depth": 1, "vocab_size": 300, "max_position_embeddings": 96},
    "tokenizer": {"train": True},
    "sample_prompts": ["Who are you?"],
    "base": {
        "data": [{"path": "facts", "rows": 100}],
        "held_out": 20,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
    },
    "mid": {
        "data": [{"path": "small_talk", "rows": 40}],
        "held_out": 4,
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
    },
    "sft": {
        "data": ["identity", {"path": "arithmetic", "rows": 30}],
        "held_out": 4,
        "examples_per_step": 4,
        "max_length": 96,
        "max_steps": 2,
        "logging_steps": 1,
    },
}


def call(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"TERM": "dumb", "COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with the tiny recipe, run by `hfsft run --json`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    done = call(str(BIN / "hfsft"), "run", "tiny.yaml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "summary.json").write_text(done.stdout)
    return folder


def test_help_imports_nothing_heavy():
    code = (
        "import sys, hfsft.cli\n"
        "try: hfsft.cli.app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'yaml'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "base", "mid", "sft", "plan", "push", "report", "chat"):
        assert f" {command} " in done.stdout


def test_run_prints_json_for_programs(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["stages"]) == ["base", "mid", "sft"]
    assert [stage["steps"] for stage in summary["stages"].values()] == [1, 1, 2]
    assert summary["model"] == "runs/tiny/sft"
    assert list(summary["accuracy"]) == ["base", "mid", "sft"]
    assert summary["accuracy"]["sft"]["arithmetic"]["rows"] == 100
    assert list(summary["answers"]) == ["Who are you?"]
    assert summary["report"] == "runs/tiny/report.md"
    assert "| arithmetic | 100 | 0% | 0% (0% to 4%) | " in (folder / summary["report"]).read_text()


def test_run_again_skips_what_is_finished(folder):
    done = call(str(BIN / "hfsft"), "run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished already") == 3
    assert "hfsft chat runs/tiny/sft" in done.stdout
    assert "right after mid" in done.stdout and "loss before" in done.stdout


def test_accelerate_launches_a_stage_by_its_path(folder):
    script = Path(__file__).parents[1] / "hfsft" / "sft.py"
    (folder / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "y"}]}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    done = call(
        *(str(BIN / "accelerate"), "launch", str(script), "tiny.yaml", "--max_steps", "3"),
        *("--output_dir", "X", "--name", "Y", "--data", "[{path: chats.jsonl}]"),
        *("--held_out", "1"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "X/Y/sft/stage.json").read_text())
    assert record["steps"] == 3 and record["status"] == "finished"
    # the run was moved on the command line and has no mid of its own
    assert record["lineage"]["model"] == "runs/tiny/mid"
    assert yaml.safe_load((folder / "X/Y/recipe.yaml").read_text())["sft"]["max_steps"] == 3


def test_two_processes_train_as_one(folder):
    losses = {}
    for processes in ("1", "2"):
        multi = ["--multi_gpu"] if processes == "2" else []
        done = call(
            *(str(BIN / "accelerate"), "launch", *multi, "--num_processes", processes),
            *("--module", "hfsft.sft", "tiny.yaml", "--name", processes),
            *("--held_out", "5", "--optim", "adamw_torch"),
            cwd=folder,
            ACCELERATE_USE_CPU="true",
        )
        assert done.returncode == 0, done.stderr
        stage = folder / "runs" / processes / "sft"
        assert json.loads((stage / "stage.json").read_text())["processes"] == int(processes)
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        losses[processes] = [line.get("loss", line.get("eval_loss")) for line in lines]
        assert len([line for line in lines if "loss" in line]) == 2
    assert losses["1"] == pytest.approx(losses["2"], rel=1e-5)


@pytest.mark.parametrize(
    "config", ["cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "zero2"]
)
def test_accelerate_configs_are_read(config):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(
        str(Path(__file__).parents[1] / "accelerate_configs" / f"{config}.yaml")
    )
    expected = {"fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    kind = expected.get(config, "MULTI_GPU" if config.startswith("multi") else "NO")
    assert read.distributed_type == kind
    assert read.use_cpu is (config == "cpu")


@pytest.mark.parametrize("config", ["cpu", pytest.param("single_gpu", marks=pytest.mark.slow)])
def test_a_config_of_one_process_launches(folder, config):
    """The others are launched in tests/train/test_machines.py and test_sharding.py."""
    done = call(
        *(str(BIN / "hfsft"), "sft", "tiny.yaml", "--config_file", config),
        *("--name", config, "--max_steps", "1", "--quiet"),
        cwd=folder,
        ACCELERATE_USE_CPU="true",
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    record = json.loads((folder / f"runs/{config}/sft/stage.json").read_text())
    assert record["precision"] == "fp32" and record["device"].startswith("cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "tiny.yaml", "--max_stepz", "3"], "--max_stepz: unknown key 'max_stepz'"),
        (["sft", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (["run", "tiny.yaml", "--max_steps", "3"], "of which stage? Say --sft.max_steps"),
        (["sft", "tiny.yaml", "--config_file", "nothing.yaml"], "--config_file: no such file"),
        (["sft", "tiny.yaml", "--name", "z", "--data", "[{path: no.jsonl}]"], "no.jsonl: no such"),
        (
            ["sft", "tiny.yaml", "--lora.r", "4", "--load_in_4bit", "--name", "q"],
            "needs a CUDA GPU",
        ),
        (["chat", "./nowhere"], "./nowhere: no such folder"),
        (["chat", "runs"], "runs holds no model"),
        (["push", "runs"], "runs: holds no finished stage and no model"),
        (["push", "nowhere"], "nowhere: holds no finished stage and no model"),
    ],
)
def test_mistakes_get_two_lines_and_status_2(folder, arguments, words):
    done = call(str(BIN / "hfsft"), *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_unreachable_hub(folder):
    done = call(
        *(str(BIN / "hfsft"), "sft", "tiny.yaml", "--name", "hub"),
        *("--model_name_or_path", "someone/some-model"),
        cwd=folder,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(folder / "hf"),
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert "cannot reach the Hub for the model someone/some-model" in lines[0]
    assert "hfsft run demo" in lines[1]


def test_plan_of_a_run_that_is_not_trained_yet(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    done = call(str(BIN / "hfsft"), "plan", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("base", "mid", "sft", "peak", "fits", "optimizer states", "on disk"):
        assert words in done.stdout
    # a plan that does not fit is a result too, not an error
    card = ("--memory", "600MB", "--sft.optim", "auto", "--json")
    done = call(str(BIN / "hfsft"), "plan", "tiny.yaml", *card, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert [stage["fits"] for stage in stages.values()] == [False] * 3
    assert {stage["precision"] for stage in stages.values()} == {"bf16"}
    assert stages["sft"]["auto"].startswith("sft: auto chose --optim")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    done = call(str(BIN / "hfsft"), "plan", "tiny.yaml", "--memory", "much", cwd=tmp_path)
    assert done.returncode == 2
    assert "--memory: expected a size such as 8GB or 7.5GiB, got 'much'" in done.stderr


def test_chat_answers_one_prompt(folder):
    done = call(str(BIN / "hfsft"), "chat", "runs/tiny/sft", "-p", "Hi", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = call(
        *(str(BIN / "hfsft"), "chat", "runs/tiny/sft", "-p", "Hi", "--json"),
        *("--max_new_tokens", "4", "--temperature", "1"),
        cwd=folder,
    )
    turns = json.loads(done.stdout)
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[0]["content"] == "Hi"


@pytest.mark.parametrize(
    ("error", "status"),
    [(HfsftError("fix it"), 2), (Interrupted("stopped", 15), 143), (KeyboardInterrupt(), 130)],
)
def test_exit_statuses(error, status, capsys):
    def fails(*argv):
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(fails)
    assert end.value.code == status
    assert capsys.readouterr().err.startswith("hfsft: ")


def test_a_tokenizer_that_panics_is_two_lines(capsys):
    def fails(*argv):
        made = Tokenizer(models.BPE({"a": 0}, []))
        made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$|(x|x)*y"), "isolated")
        made.encode("a" * 60 + "!")

    with pytest.raises(SystemExit) as end:
        run_main(fails)
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if not line.startswith(("thread", "note:", "called"))]
    assert any(line.startswith("hfsft: a text cannot be tokenized: ") for line in lines)
    assert "Traceback" not in "".join(said)


def test_a_bug_is_not_hidden():
    def fails(*argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(fails)
