"""Windows and macOS: a stage trains where POSIX's modules, signals and calls are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

# what Windows or macOS lack, removed from an interpreter before hfsft is imported
WITHOUT = """
import importlib, os, pkgutil, signal, sys
import datasets, torch, transformers, trl, peft, bitsandbytes, accelerate  # their own is not tested
for name in ("resource", "fcntl", "pwd", "grp", "termios", "posix_ipc"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPROF", "SIGQUIT", "SIGSTOP",
             "setitimer", "ITIMER_PROF", "alarm", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fork", "forkpty", "register_at_fork", "sysconf", "killpg", "setsid", "getuid",
             "sched_getaffinity", "getpgid", "waitid", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
real = os.open
def opened(path, flags, *rest, **more):
    if os.path.isdir(path) or str(path).startswith("/proc/"):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, flags, *rest, **more)
os.open = opened
from hfsft import base, mid, sft
from hfsft.process import run_main
for module in pkgutil.walk_packages(importlib.import_module("hfsft").__path__, "hfsft."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for stage in (base, mid, sft):
    run_main(stage.main, sys.argv[1], "--quiet")
"""
SHARED = {"held_out": 4, "max_length": 64, "max_steps": 2, "save_steps": 1}
RECIPE = {
    "name": "r",
    "sample_prompts": ["Who are you?"],
    "model": {"depth": 2, "vocab_size": 400, "max_position_embeddings": 64},
    "tokenizer": {"train": True},
    "base": {"data": [{"path": "facts", "rows": 60}], "tokens_per_step": 256, **SHARED},
    "mid": {"data": [{"path": "small_talk", "rows": 40}], "tokens_per_step": 256, **SHARED},
    "sft": {"data": [{"path": "identity", "rows": 40}], "examples_per_step": 4, **SHARED},
}


def test_every_module_imports_and_the_stages_train_without_what_only_posix_has(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path)}))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(path)],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("base", "mid", "sft"):
        folder = tmp_path / "r" / stage
        record = json.loads((folder / "stage.json").read_text())
        assert record["status"] == "finished" and record["peak_memory_bytes"] > 2**20
        assert (folder / "model.safetensors").is_file()
        manifest = Path(folder / "checkpoints" / "checkpoint-2" / "manifest.json")
        assert manifest.is_file()
