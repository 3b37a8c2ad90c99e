"""A stage that pushes, run as a process against a Hub on loopback."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import Account, HubServer

PLANTED = "hf_PlantedTokenToLookForEverywhere0000"
RECIPE = {
    "name": "fast",
    "sft": {
        "model_name_or_path": "start",
        "data": [{"path": "identity", "rows": 40}],
        "held_out": 4,
        "examples_per_step": 4,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "max_steps": 2,
        "save_steps": 1,
        "eval_steps": 1,
        "optim": "adamw_torch",
        "push_to_hub": True,
    },
}


@pytest.fixture
def hub():
    with HubServer() as hub:
        hub.tokens[PLANTED] = Account("me", "write")
        yield hub


@pytest.fixture
def home(tmp_path, tokenizer, make_model) -> Path:
    """A folder with the recipe and the model that it starts from."""
    make_model("llama").save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def sft(hub, home: Path, *arguments: str, token=PLANTED) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hfsft.sft", "fast.yaml", *arguments],
        cwd=home,
        env=hub.env(home / "hf", token) | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_a_stage_is_pushed_and_its_token_is_nowhere(hub, home):
    done = sft(hub, home, "--hub_strategy", "checkpoint")
    assert done.returncode == 0, done.stderr
    assert f"pushed sft: {hub.endpoint}/me/fast/commit/" in done.stdout
    files = hub.files("me/fast")
    assert {"model.safetensors", "config.json", "README.md", "stage.json"} <= set(files)
    assert not {name for name in files if name.startswith(("checkpoints", "rejected"))}
    assert b'model="me/fast")' in files["README.md"]
    checkpoint = hub.files("me/fast", revision="checkpoints")
    manifest = json.loads(checkpoint["last-checkpoint/manifest.json"])
    assert manifest["step"] == 2
    assert set(manifest["files"]) <= {name.partition("/")[2] for name in checkpoint}
    written = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    for text in (*written, *files.values(), *checkpoint.values()):
        assert PLANTED.encode() not in text
    assert PLANTED not in done.stdout + done.stderr


def test_a_push_that_fails_ends_in_2_with_everything_on_disk(hub, home):
    fault = hub.fail("POST .*/commit/", times=999, status=400)
    done = sft(hub, home)
    stage = home / "runs" / "fast" / "sft"
    assert done.returncode == 2 and "hfsft push runs/fast/sft" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((stage / "stage.json").read_text())["status"] == "finished"
    assert (stage / "model.safetensors").is_file() and (stage / "README.md").is_file()
    assert (stage / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()
    fault.times = 0
    done = subprocess.run(
        [Path(sys.executable).parent / "hfsft", "push", "runs/fast"],
        cwd=home,
        env=hub.env(home / "hf", PLANTED),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.files("me/fast")
    assert "model.safetensors" in hub.files("me/fast", revision="checkpoints")
    # the repository is not a setting that the result depends on
    assert "finished already" in sft(hub, home, "--hub_model_id", "me/other").stdout


@pytest.mark.parametrize("token", [None, "hf_read"])
def test_a_token_without_write_access_is_reported_before_anything_is_done(hub, home, token):
    hub.add_repo("me/fast")  # a read-only token sees it
    done = sft(hub, home, token=token)
    assert done.returncode == 2
    assert done.stderr.startswith("hfsft: sft.push_to_hub: ")
    assert "--sft.push_to_hub false" in done.stderr
    assert not (home / "runs").exists()


def test_interrupted_during_the_push_it_says_how_to_resume(hub, home):
    hub.fail("POST .*/commit/", delay=90.0)
    run = subprocess.Popen(
        [sys.executable, "-m", "hfsft.sft", "fast.yaml"],
        cwd=home,
        env=hub.env(home / "hf", PLANTED) | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("pushing to me/fast" in line for line in run.stdout)
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=60)[1]
    assert run.returncode == 143
    assert printed == (
        "hfsft: sft: stopped during the push; the model is finished in runs/fast/sft\n"
        "  To resume the push: hfsft push runs/fast/sft\n"
    )
    assert json.loads((home / "runs/fast/sft/stage.json").read_text())["status"] == "finished"
