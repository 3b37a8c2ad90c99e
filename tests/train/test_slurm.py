"""A job on a real Slurm cluster of two nodes on loopback: a time limit, then a node that dies.

Needs root and Debian's `slurm-wlm` (slurmctld, slurmd, munged); else it is skipped.
"""

import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from faults import RECIPE, bits

from hfsft import base

SBATCH = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"
STEPS = 60
CONF = """
ClusterName=hfsft
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge.sock,cred_expire=30
SlurmctldPort={port}
SlurmdTimeout=10
ReturnToService=2
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool.%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root and slurm-wlm",
    ),
]


class Cluster:
    """Slurm's daemons on this machine, with two nodes."""

    def __init__(self, here: Path):
        self.here = here
        port = 20000 + os.getpid() % 20000
        ports = {"port": port, "first": port + 1, "second": port + 2}
        host = platform.node().partition(".")[0]
        (here / "slurm.conf").write_text(CONF.format(here=here, host=host, **ports))
        (here / "state").mkdir()
        key = here / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.env = {
            **os.environ,
            "SLURM_CONF": str(here / "slurm.conf"),
            "ACCELERATE_USE_CPU": "true",
            "MASTER_ADDR": "127.0.0.1",  # the nodes have no names of their own
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={here}/munge.{end}" for name, end in files.items()]
        self.call("munged", "--force", f"--key-file={key}", *options)
        self.call("slurmctld")
        for node in ("n0", "n1"):
            self.call("slurmd", "-N", node)
        self.until(lambda: self.call("sinfo", "-h", "-o", "%t%D") == "idle2", 60)

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, cwd=self.here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def until(self, true: object, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            if true():
                return
            time.sleep(0.5)
        raise AssertionError((self.here / "slurmctld.log").read_text()[-2000:])

    def submit(self, name: str) -> str:
        argv = ("sft", "faults.yaml", "--name", name, "--max_steps", str(STEPS))
        argv += ("--model_name_or_path", "runs/start/base")
        return self.call("sbatch", "--parsable", f"--output={name}.log", str(SBATCH), *argv)

    def state(self, job: str) -> str:
        return self.call("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]

    def restarted(self, job: str) -> int:
        """How often a job went back into the queue, where it waits for `cred_expire` seconds."""
        shown = self.call("scontrol", "show", "job", job)
        return int(shown.partition("Restarts=")[2].split()[0])

    def log(self, name: str) -> str:
        path = self.here / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def kill_node(self, node: str) -> None:
        """Its daemon, the steps that the daemon started, and all that ran in them."""
        daemon = psutil.Process(int((self.here / f"{node}.pid").read_text()))
        for process in [daemon, *daemon.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    process.kill()

    def close(self) -> None:
        for node in ("n0", "n1"):
            with suppress(psutil.NoSuchProcess):
                self.kill_node(node)
        for pid in self.here.glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path_factory):
    here = tmp_path_factory.mktemp("slurm")
    recipe = RECIPE | {"sft": RECIPE["sft"] | {"save_steps": 10, "eval_steps": 30}}
    recipe |= {"output_dir": "runs"}
    (here / "faults.yaml").write_text(yaml.safe_dump(recipe))
    base.main(str(here / "faults.yaml"), "--output_dir", str(here / "runs"), "--quiet")
    made = Cluster(here)
    yield made
    made.close()


def test_a_job_is_told_to_stop_and_then_a_node_dies_and_it_resumes(cluster):
    whole = cluster.submit("whole")
    cluster.until(lambda: cluster.state(whole) == "COMPLETED", 600)
    job = cluster.submit("job")
    cluster.until(lambda: "step 20/" in cluster.log("job"), 600)
    cluster.call("scancel", "--signal=TERM", job)  # as before the time limit
    cluster.until(lambda: cluster.restarted(job) == 1, 180)
    cluster.until(lambda: "step 40/" in cluster.log("job"), 600)
    cluster.kill_node("n1")
    cluster.until(lambda: cluster.restarted(job) == 2, 180)
    cluster.call("slurmd", "-N", "n1")
    cluster.until(lambda: cluster.state(job) == "COMPLETED", 900)
    said = cluster.log("job")
    assert "2 processes on 2 machines, DDP" in said and "sft stopped by SIGTERM at step" in said
    assert said.count("sft: resuming from") == 2
    runs = cluster.here / "runs"
    assert bits(runs / "job/sft", STEPS) == bits(runs / "whole/sft", STEPS)
