"""Programs that a model wrote: good ones succeed, bad ones are stopped and leave nothing behind."""

import pytest

from hfsft.evaluation.execution import succeeds


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import math, re, typing, collections, itertools, functools, heapq, hashlib, random",
        "print('x' * 10_000_000)",  # output is discarded
        "text = '\ud800 \u00e9'",
        "assert __name__ != '__main__'",
        "import os\ntry:\n    os.fork()\nexcept PermissionError:\n    pass",
    ],
)
def test_succeeds(program):
    assert succeeds(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "this is no Python",
        "\x00",
        "import sys\nsys.exit(0)",  # before the tests
        "import os\nos._exit(0)",
        "raise SystemExit",
        "while True: pass",
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.fork()",
        "import posix\nposix.fork()",
        "x = 'a' * (8 << 30)",
        "x = []\nwhile True: x.append('a' * (1 << 24))",
        "def f(): f()\nf()",
        "input()",
        "import subprocess\nsubprocess.run(['true'])",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import ctypes\nctypes.CDLL(None)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import os\nos.kill(os.getppid(), 9)",
    ],
)
def test_fails(program):
    assert not succeeds(program, seconds=1)


def test_a_sleeping_program_is_killed():
    assert not succeeds("import time\ntime.sleep(600)", seconds=1)


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w').write('x')",
        "open({path!r}, 'a').write('x')",
        "import os\nos.open({path!r}, os.O_WRONLY | os.O_CREAT)",
        "import os\nos.remove({kept!r})",
        "import os\nos.rename({kept!r}, {path!r})",
        "import os\nos.truncate({kept!r}, 0)",
        "import os\nos.chmod({kept!r}, 0)",
        "import shutil\nshutil.rmtree({folder!r})",
        "import pathlib\npathlib.Path({path!r}).mkdir()",
        "import tempfile\ntempfile.NamedTemporaryFile(dir={folder!r}, delete=False)",
    ],
)
def test_nothing_is_written_or_deleted(program, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    paths = {"path": str(tmp_path / "new"), "kept": str(kept), "folder": str(tmp_path)}
    assert not succeeds(program.format(**paths))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


def test_it_gets_neither_environment_nor_folder_nor_packages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert succeeds(
        "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir() == []\n"
        "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError"
    )
