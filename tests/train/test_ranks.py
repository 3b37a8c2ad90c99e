"""Two processes: one that dies or is stopped is named, signals stop both at the same step."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from faults import RECIPE, bits, harness

from hfsft import base
from hfsft.train import ranks

BIN = Path(sys.executable).parent
CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",  # on the CPU by ACCELERATE_USE_CPU
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "gpu_ids": "all",
    "use_cpu": False,
}
STEPS = 120
# what a rank does that waits in C for another; argv: the rank, the store's port, beats
WAITS = """
import sys, time
from pathlib import Path
from torch.distributed import TCPStore
from hfsft.train import ranks
rank, port, ranks.SILENT = map(int, sys.argv[1:])
store = TCPStore("127.0.0.1", port, is_master=False)
store.set(f"ready {rank}", "")
store.wait(["ready 0", "ready 1"])
ranks.machine = lambda: 0
ranks.Watchdog(Path("checkpoints"), store.clone(), rank, 2).start()
print("watches", flush=True)
store.wait(["what never comes"])
"""


def waiting_rank(folder: Path, rank: int, port: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WAITS, str(rank), port, "4"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True"},
    )


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGSTOP, r"was stopped, silent for \d+ s, and is now killed"),
        (signal.SIGKILL, r"is dead, silent for \d+ s"),
    ],
)
def test_the_rank_that_is_left_names_the_other_and_ends(tmp_path, number, how):
    from torch.distributed import TCPStore

    (tmp_path / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [waiting_rank(tmp_path, rank, str(store.port)) for rank in range(2)]
    for rank in ranks:
        assert rank.stdout.readline() == "watches\n"
    time.sleep(3)  # they have seen each other
    ranks[1].send_signal(number)
    said = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == 2
    assert re.search(
        rf"^hfsft: rank 1 \(process {ranks[1].pid} on \S+\) {how}; the newest checkpoint is "
        r"checkpoints/checkpoint-7\n  The same command resumes from it$",
        said,
        re.M,
    )
    assert ranks[1].wait(timeout=60) == -signal.SIGKILL


def test_a_stopped_rank_that_has_ended_meanwhile_is_named(tmp_path, monkeypatch, capsys):
    from torch.distributed import TCPStore

    def leave(status: int) -> None:
        raise SystemExit(status)

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(ranks, "machine", lambda: 0)
    monkeypatch.setattr(os, "_exit", leave)
    watchdog = ranks.Watchdog(tmp_path, store, 0, 2)
    with subprocess.Popen([sys.executable, "-c", ""]) as peer:
        watchdog.identities[1] = {"pid": peer.pid, "host": "here"}
    monkeypatch.setattr(watchdog, "_state", lambda rank: "T")
    with pytest.raises(SystemExit):
        watchdog._exit_because_of(1)
    assert f"rank 1 (process {peer.pid} on here) was stopped" in capsys.readouterr().err


def test_a_store_that_answers_no_more_ends_the_ranks_with_who_held_it(tmp_path):
    """A stopped launcher: a call on its store would block for ever."""
    holds = "from torch.distributed import TCPStore; import time; "
    holds += "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
    holds += "print(store.port, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE, text=True)
    port = holder.stdout.readline().strip()
    ranks = [waiting_rank(tmp_path, rank, port) for rank in range(2)]
    for rank in ranks:
        assert rank.stdout.readline() == "watches\n"
    time.sleep(2)
    holder.send_signal(signal.SIGSTOP)
    try:
        for rank in ranks:
            said = rank.communicate(timeout=60)[1]
            assert rank.returncode == 2
            assert re.search(
                r"^hfsft: the launcher of machine 0 on \S+ has been silent for 4 s; there is no "
                r"checkpoint yet\n  The same command starts over$",
                said,
                re.M,
            )
    finally:
        holder.kill()


JOINS = """
import os, sys, time
from pathlib import Path
from hfsft.train import ranks
ranks.JOIN_POLL = 0.2
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "0", "RANK": "0"}
os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
with ranks.watch_launchers(Path("checkpoints")):
    print("joins", flush=True)
    time.sleep(600)  # as the group does for half an hour
"""


def test_a_rank_that_joins_ends_when_the_launcher_is_gone(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as launcher:
        command = [sys.executable, "-c", JOINS, str(launcher.getsockname()[1])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        rank = subprocess.Popen(command, cwd=tmp_path, **pipes)
        assert rank.stdout.readline() == "joins\n"
        time.sleep(1)
        assert rank.poll() is None
    said = rank.communicate(timeout=60)[1]
    assert rank.returncode == 2
    assert said == (
        "hfsft: the launcher of machine 0 is gone; there is no checkpoint yet\n"
        "  The same command starts over\n"
    )


@pytest.mark.slow
def test_killed_at_a_random_moment_two_ranks_and_a_stream_end_with_the_same_bits(tmp_path):
    said = harness(tmp_path, "--rounds", "1", "--configs", "ranks,stream")
    assert said.count(" 0 other statuses, 0 mismatches\n") == 2


# --- under the launchers ---


class Launched:
    """`hfsft sft` or `accelerate launch` with two ranks."""

    def __init__(self, folder: Path, launcher: str, name: str = "two"):
        argv = ("faults.yaml", "--name", name, "--max_steps", str(STEPS))
        argv += ("--model_name_or_path", "runs/start/base")
        two = ["--config_file", "two.yaml"]
        commands = {
            "hfsft": [str(BIN / "hfsft"), "sft", *argv, *two],
            "accelerate": [str(BIN / "accelerate"), "launch", *two, "-m", "hfsft.sft", *argv],
        }
        self.process = subprocess.Popen(
            commands[launcher],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("w"),
            text=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )
        self.stderr = folder / "stderr"
        self.ranks: list[psutil.Process] = []

    def reach(self, words: str) -> None:
        """Read what it says up to these words, and find its ranks."""
        assert any(words in line for line in self.process.stdout), self.stderr.read_text()
        ranks = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            ranks.setdefault(child.environ()["RANK"], child)
        self.ranks = [ranks["0"], ranks["1"]]

    def end(self) -> tuple[int, str]:
        """Wait for all processes; the exit status, and what was said on standard error."""
        self.process.stdout.read()
        status = self.process.wait(timeout=90)
        assert psutil.wait_procs(self.ranks, timeout=10)[1] == []
        return status, self.stderr.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the harness's recipe, its base, and Accelerate's config."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    data = RECIPE | {"sft": RECIPE["sft"] | {"save_steps": 50, "eval_steps": 200}}
    (folder / "faults.yaml").write_text(yaml.safe_dump(data | {"output_dir": "runs"}))
    base.main(str(folder / "faults.yaml"), "--output_dir", str(folder / "runs"), "--quiet")
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_rank_is_killed_under_hfsft(folder):
    run = Launched(folder, "hfsft")
    run.reach("step 60/")
    run.ranks[1].kill()
    status, said = run.end()
    assert status == 2
    assert re.search(
        rf"hfsft: rank 1 \(process {run.ranks[1].pid} on .* is dead, silent for .*-50\n", said
    )
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["hfsft", "accelerate"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_stopped(folder, launcher, rank):
    run = Launched(folder, launcher)
    run.reach("step 60/")
    run.ranks[rank].suspend()
    began = time.monotonic()
    status, said = run.end()
    assert time.monotonic() - began < 60
    assert status == (2 if launcher == "hfsft" else 1)
    assert re.search(rf"hfsft: rank {rank} \(process .* was stopped, silent for .*-50\n", said)


@pytest.fixture(scope="module")
def undisturbed(trained) -> dict[str, str]:
    """What a run leaves that nobody disturbed."""
    assert Launched(trained, "hfsft", "whole").end()[0] == 0
    return bits(trained / "runs/whole/sft", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "name", "told"),
    [
        *(("hfsft", "TERM", told) for told in ("launcher", "0", "1", "both")),
        ("hfsft", "INT", "launcher"),
        ("hfsft", "INT", "1"),
        ("hfsft", "HUP", "both"),
        ("accelerate", "TERM", "launcher"),
        ("accelerate", "INT", "0"),
    ],
)
def test_signals_stop_both_at_the_same_step(folder, undisturbed, launcher, name, told):
    number = signal.Signals[f"SIG{name}"]
    run = Launched(folder, launcher)
    run.reach("step 60/")
    targets = {"launcher": [run.process], "0": run.ranks[:1], "1": run.ranks[1:], "both": run.ranks}
    for process in targets[told]:
        process.send_signal(number)
        time.sleep(0.1)  # some steps later; half a second later all have ended
    status, said = run.end()
    assert status == (128 + number if launcher == "hfsft" else 1), said
    stopped = rf"sft stopped by SIG{name} at step \d+ of {STEPS}, saved in"
    assert len(re.findall(stopped, said)) == 1
    sft = folder / "runs/two/sft"
    assert json.loads((sft / "stage.json").read_text())["status"] == "interrupted"
    again = Launched(folder, launcher)
    assert again.end()[0] == 0
    assert bits(sft, STEPS) == undisturbed


@pytest.mark.slow
def test_the_launcher_is_killed(folder, undisturbed):
    """The ranks save a checkpoint and end, and the same command resumes from it."""
    run = Launched(folder, "hfsft")
    run.reach("step 60/")
    run.process.kill()
    status, said = run.end()
    assert status == -signal.SIGKILL
    assert "hfsft: the launcher of machine 0 is gone; " in said and "Traceback" not in said
    assert Launched(folder, "hfsft").end()[0] == 0
    assert bits(folder / "runs/two/sft", STEPS) == undisturbed


@pytest.mark.slow
def test_the_launcher_is_killed_before_its_ranks_have_joined(folder):
    run = Launched(folder, "hfsft")
    while len(run.ranks) < 2:
        time.sleep(0.1)
        run.ranks = psutil.Process(run.process.pid).children()
    run.process.kill()
    assert psutil.wait_procs(run.ranks, timeout=60)[1] == []
    status, said = run.end()
    assert status == -signal.SIGKILL
    assert re.search(r"^hfsft: the launcher of .* is gone; there is no checkpoint yet$", said, re.M)
    assert "Traceback" not in said
