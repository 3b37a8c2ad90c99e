"""FSDP2 and DeepSpeed's ZeRO-2 with two ranks and gloo, each stage against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from faults import LORA, RECIPE, difference, losses

from hfsft import base, mid, sft

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
OPTIM = ("--optim", "adamw_torch_fused")
STAGES = {
    "base": (base, ()),
    "mid": (mid, ("--model_name_or_path", "runs/start/base")),
    "sft": (sft, ("--model_name_or_path", "runs/start/mid")),
    "lora": (sft, ("--model_name_or_path", "runs/start/mid", *LORA)),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def deepspeed(tmp_path_factory) -> dict[str, str]:
    """The environment in which DeepSpeed, installed for this test, is found."""
    target = os.environ.get("HFSFT_TEST_DEEPSPEED")
    if target is None:
        target = str(tmp_path_factory.mktemp("deepspeed"))
        needs = ("hjson", "py-cpuinfo", "msgpack", "ninja", "einops")
        install = [sys.executable, "-m", "pip", "install", "-q", "--target", target, "--no-deps"]
        done = subprocess.run(
            [*install, "--no-build-isolation", "deepspeed", *needs],
            env={**os.environ, "DS_BUILD_OPS": "0"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"DeepSpeed cannot be installed: {done.stderr[-200:]}")
    paths = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))
    # DeepSpeed compiles for the CPU at its first start
    return {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": f"{target}/built"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe, its stages trained by one process, and the configs' CPU form."""
    folder = tmp_path_factory.mktemp("sharding")
    model = RECIPE["model"] | {"attention_dropout": 0.0}
    recipe = RECIPE | {"model": model, "output_dir": "runs"}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("fsdp2", "zero2"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | {"mixed_precision": "no"}))
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("base", "mid"):
            module, extra = STAGES[name]
            module.main("r.yaml", "--quiet", *extra)
        for name, (module, extra) in STAGES.items():
            module.main("r.yaml", "--quiet", "--name", f"one-{name}", *OPTIM, *extra)
    finally:
        os.chdir(before)
    return folder


def launch(folder: Path, config: str, name: str, run: str, env: dict) -> subprocess.Popen:
    """Start a stage under a config; FSDP2 through the shim that lets Accelerate take gloo."""
    module, extra = STAGES[name]
    stage = module.__name__.rpartition(".")[2]
    shim = [str(Path(__file__).with_name("fsdp_on_gloo.py")), stage]
    script = shim if config == "fsdp2" else ["-m", f"hfsft.{stage}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", f"{config}.yaml", *script, "r.yaml", "--name", run, *OPTIM, *extra]
    cpu = {"ACCELERATE_USE_CPU": "true"} if config == "fsdp2" else {}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **env, **cpu, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=(folder / f"{run}.err").open("w"),
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_two_ranks_train_as_one_process(folder, request, config, name):
    env = request.getfixturevalue("deepspeed") if config == "zero2" else {}
    run = launch(folder, config, name, f"{config}-{name}", env)
    said = run.communicate(timeout=900)[0]
    assert run.returncode == 0, (folder / f"{config}-{name}.err").read_text()
    kind = {"fsdp2": "FSDP2", "zero2": "ZeRO-2"}[config]
    assert f": 2 processes on 1 machine, {kind}, cpu, fp32\n" in said.partition("data")[0]
    stage = "sft" if name == "lora" else name
    one, two = (folder / "runs" / made / stage for made in (f"one-{name}", f"{config}-{name}"))
    assert difference(one, two) <= 5e-6
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    made, expected = ({path.name for path in found.iterdir()} for found in (two, one))
    assert made == expected  # a plain model, and nothing of a sharded one
    manifest = json.loads(next((two / "checkpoints").glob("*-6/manifest.json")).read_text())
    assert manifest["layout"] == {"kind": kind, "processes": 2, "machines": 1}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_killed_and_resumed_it_ends_with_the_same_bits(folder, request, config, name):
    env = request.getfixturevalue("deepspeed") if config == "zero2" else {}
    stage = "sft" if name == "lora" else name
    whole = folder / "runs" / f"{config}-{name}" / stage
    if not (whole / "model.safetensors").is_file():
        assert launch(folder, config, name, f"{config}-{name}", env).wait(timeout=900) == 0
    killed = launch(folder, config, name, f"killed-{config}-{name}", env)
    assert any("step 4/6" in line for line in killed.stdout)
    for process in psutil.Process(killed.pid).children(recursive=True):
        process.kill()
    os.killpg(killed.pid, signal.SIGKILL)
    time.sleep(1)
    again = launch(folder, config, name, f"killed-{config}-{name}", env)
    assert "resuming from" in again.communicate(timeout=900)[0]
    assert again.returncode == 0
    found = folder / "runs" / f"killed-{config}-{name}" / stage
    for file in ("model.safetensors", *(["adapter/adapter_model.safetensors"] * (name == "lora"))):
        assert (found / file).read_bytes() == (whole / file).read_bytes()
    assert losses(found) == losses(whole)


def test_another_layout_is_refused_in_two_lines(folder):
    sharded = folder / "runs" / "fsdp2-sft" / "sft"
    if not (sharded / "model.safetensors").is_file():
        assert launch(folder, "fsdp2", "sft", "fsdp2-sft", {}).wait(timeout=900) == 0
    (sharded / "stage.json").write_text(
        json.dumps(json.loads((sharded / "stage.json").read_text()) | {"status": "interrupted"})
    )
    command = [sys.executable, "-m", "hfsft.sft", "r.yaml", "--name", "fsdp2-sft", *OPTIM]
    done = subprocess.run(
        [*command, *STAGES["sft"][1]],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "was written by 2 processes on 1 machine, FSDP2, and this is 1 process" in done.stderr
    assert done.stderr.count("\n") == 2
