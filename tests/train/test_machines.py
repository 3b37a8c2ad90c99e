"""Other numbers of processes, several machines, a long preparation: real launches, with gloo."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from faults import LORA, RECIPE, difference, harness, losses

from hfsft import base, sft

pytestmark = pytest.mark.slow
STEPS = 24
SETTINGS = ("--max_steps", str(STEPS), "--save_steps", "4", "--optim", "adamw_torch_fused")
ENV = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
# a preparation of 20 s on rank 0, with a time-out of 10 s
SLOW_DATA = """
import os, sys, time
from hfsft import sft
from hfsft.data import mixture
from hfsft.process import run_main
check = mixture.check_source
def slow(*given):
    time.sleep(20 if os.environ["RANK"] == "0" else 0)
    return check(*given)
mixture.check_source = slow
run_main(sft.main, *sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe, its base, and `one`: sft, LoRA and base by one process."""
    folder = tmp_path_factory.mktemp("machines")
    model = RECIPE["model"] | {"attention_dropout": 0.0}
    (folder / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"model": model, "output_dir": "runs"}))
    before = Path.cwd()
    os.chdir(folder)
    try:
        base.main("r.yaml", "--quiet")
        base.main("r.yaml", "--quiet", "--name", "one", *SETTINGS)
        sft.main("r.yaml", "--quiet", "--name", "one", *START, *SETTINGS)
        sft.main("r.yaml", "--quiet", "--name", "one-lora", *START, *SETTINGS, *LORA)
    finally:
        os.chdir(before)
    return folder


START = ("--model_name_or_path", "runs/start/base")


def start(folder: Path, stage: str, name: str, *options: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    extra = START if stage == "sft" else ()
    command = [sys.executable, "-m", "hfsft", stage, "r.yaml", "--name", name, *extra, *SETTINGS]
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env=ENV | {"HF_DATASETS_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(run: subprocess.Popen) -> tuple[int, str, str]:
    said, errors = run.communicate(timeout=600)
    return run.returncode, said, errors


@pytest.mark.parametrize("extra", [(), LORA], ids=["full", "lora-with-dropout"])
def test_stopped_and_resumed_under_other_numbers_of_processes(folder, extra):
    name = "changing-lora" if extra else "changing"
    for options in (("--config_file", "multi_gpu"), ("--num_processes", "4"), ()):
        run = start(folder, "sft", name, *extra, *options)
        if options:
            step = "step 6/" if options[0] == "--config_file" else "step 14/"
            assert any(step in line for line in run.stdout)
            run.send_signal(signal.SIGTERM)
            assert ended(run)[0] == 128 + signal.SIGTERM
        else:
            status, said, errors = ended(run)
            assert (status, errors) == (0, "") and "sft: resuming from" in said
    one = folder / "runs" / ("one-lora" if extra else "one") / "sft"
    changing = folder / "runs" / name / "sft"
    assert difference(one, changing) <= 5e-6
    assert losses(changing) == pytest.approx(losses(one), abs=1e-6)


@pytest.mark.parametrize("config", ["layouts-base", "layouts-mid", "layouts", "layouts-lora"])
def test_killed_and_resumed_under_other_numbers_of_processes(tmp_path, config):
    """Also: 2 and 4 processes, left alone, against one; of LoRA with dropout."""
    assert " 0 other statuses, 0 mismatches\n" in harness(
        tmp_path, "--rounds", "2", "--configs", config
    )


def test_two_machines_without_a_shared_folder(folder, tmp_path):
    """Machine 1 is killed; machine 0 names it; the checkpoint reaches machine 1 again."""
    for place in ("0", "1"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "r.yaml").write_bytes((folder / "r.yaml").read_bytes())

    def both(port: str) -> list[subprocess.Popen]:
        options = ("--config_file", "multi_node", "--main_process_port", port)
        return [
            start(tmp_path / place, "base", "two", *options, "--machine_rank", place)
            for place in ("0", "1")
        ]

    machines = both("29731")
    first = next(machines[0].stdout)
    assert first == "base: 2 processes on 2 machines, DDP, cpu, fp32\n"
    assert any("step 6/" in line for line in machines[0].stdout)
    for process in psutil.Process(machines[1].pid).children(recursive=True):
        process.kill()
    machines[1].kill()
    status, _, errors = ended(machines[0])
    assert status == 2
    dead = r"^hfsft: rank 1 \(process \d+ on \S+\) is dead, silent for \d+ s; the newest .*-4$"
    assert re.search(dead, errors, re.M), errors
    assert [ended(machine)[0] for machine in both("29732")] == [0, 0]
    assert difference(folder / "runs/one/base", tmp_path / "0/runs/two/base") <= 5e-6
    assert losses(tmp_path / "0/runs/two/base") == pytest.approx(
        losses(folder / "runs/one/base"), abs=1e-6
    )
    assert not (tmp_path / "1/runs/two/base/model.safetensors").exists()


def test_machines_that_differ_are_both_ended_in_two_lines(folder, tmp_path):
    runs = []
    for rank, place in enumerate((folder, tmp_path / "1")):
        place.mkdir(exist_ok=True)
        (place / "r.yaml").write_bytes((folder / "r.yaml").read_bytes())
        options = ("--config_file", "multi_node", "--main_process_port", "29733")
        seed = ("--seed", "7") if rank else ()
        runs.append(start(place, "base", "differs", *options, "--machine_rank", str(rank), *seed))
    for status, _, errors in map(ended, runs):
        assert status == 2
        assert re.search(r"base: seed differs: 42 for rank 0 .*, 7 for rank 1 on machine 1", errors)
        assert errors.count("\n") == 2


def test_the_others_wait_longer_than_the_time_out(folder):
    (folder / "slow_data.py").write_text(SLOW_DATA)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "slow_data.py", "r.yaml"]
    command += ["--name", "slow", "--max_steps", "2", "--ddp_timeout", "10", *START]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    waits = (
        r"^rank 1 on machine 0 \(.*\) waits for its machine's first one, which prepares the data$"
    )
    assert re.search(waits, done.stdout, re.M)
