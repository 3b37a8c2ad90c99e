"""Programs that a model wrote: good ones pass, others do not, and none leaves or fakes anything."""

import itertools
import math
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from hfsft.evaluation import execution
from hfsft.evaluation.confined import packed, unpacked
from hfsft.evaluation.execution import NO_SANDBOX, SANDBOXES, passes, sandbox

SQUARE = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"


def run(program: str, test: str = SQUARE, prompt: str = "", seconds: int = 5) -> bool:
    return passes(program, "f", prompt, test, seconds)


def runs(program: str, seconds: int = 5) -> bool:
    """Whether a program runs to its end."""
    test = "def check(candidate):\n    assert candidate() is None\n"
    return run(f"{program}\ndef f(): pass", test, seconds=seconds)


@pytest.fixture(scope="module", params=[*SANDBOXES, NO_SANDBOX])
def each_sandbox(request):
    """Each of the sandboxes that work here, and none."""
    before, execution.sandbox = execution.sandbox, lambda: request.param
    try:
        if request.param != NO_SANDBOX and not works(request.param):
            pytest.skip(f"{request.param} does not work here")
        yield request.param
    finally:
        execution.sandbox = before


def works(name: str) -> bool:
    sandbox.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(execution, "SANDBOXES", {name: SANDBOXES[name]})
        try:
            return sandbox() == name
        finally:
            sandbox.cache_clear()


@pytest.mark.parametrize("name", SANDBOXES)
def test_a_sandbox_that_the_system_has_is_used(name):
    """Else the tests of each sandbox would be skipped where its code is broken."""
    prefix, _ = SANDBOXES[name]
    if prefix:
        found = shutil.which(prefix[0])
        has = found and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    else:
        modules = Path("/sys/kernel/security/lsm")
        has = find_spec("landlock") and modules.exists() and "landlock" in modules.read_text()
    if not has:
        pytest.skip(f"{name}: the system has none")
    assert works(name)


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import math, re, typing, collections, itertools, functools, heapq, hashlib, random",
        "print('x' * 10_000_000)",  # output is discarded
        "text = '\ud800 \u00e9'",
        "assert __name__ != '__main__'",
        "import os\ntry:\n    os.fork()\nexcept PermissionError:\n    pass",
        "import collections, dataclasses, enum\nP = collections.namedtuple('P', 'x y')\n"
        "@dataclasses.dataclass\nclass D:\n    x: int = 1\nclass E(enum.Enum):\n    A = 1",
    ],
)
def test_what_a_solution_may_do(program):
    assert runs(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "this is no Python",
        "\x00",
        "import sys\nsys.exit(0)",  # before the tests
        "import os\nos._exit(0)",
        "raise SystemExit",
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.fork()",
        "import posix\nposix.fork()",
        "x = 'a' * (8 << 30)",
        "x = []\nwhile True: x.append('a' * (1 << 24))",
        "def g(): g()\ng()",
        "input()",
        "import subprocess\nsubprocess.run(['true'])",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import ctypes\nctypes.CDLL(None)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import os\nos.kill(os.getppid(), 9)",
        "import time\ntime.sleep(600)",
    ],
)
def test_what_it_may_not(program):
    assert not runs(program, seconds=1)


# --- files ---

WRITES = [
    "open({path!r}, 'w').write('x')",
    "open({path!r}, 'a').write('x')",
    "import os\nos.open({path!r}, os.O_WRONLY | os.O_CREAT)",
    "import os\nos.open({kept!r}, os.O_RDONLY | os.O_TRUNC)",
    "import os\nos.open({folder!r}, os.O_RDWR | os.O_TMPFILE)",
    "import os\nos.mkfifo({path!r})",
    "import os\nos.mknod({path!r})",
    "import posix\nposix.mkfifo({path!r})",
    "import posix\nposix.mknod({path!r})",
    "import os\nos.remove({kept!r})",
    "import os\nos.rename({kept!r}, {path!r})",
    "import os\nos.link({kept!r}, {path!r})",
    "import os\nos.symlink({kept!r}, {path!r})",
    "import os\nos.truncate({kept!r}, 0)",
    "import os\nos.chmod({kept!r}, 0)",
    "import os\nos.utime({kept!r}, (0, 0))",
    "import shutil\nshutil.rmtree({folder!r})",
    "import pathlib\npathlib.Path({path!r}).mkdir()",
    "import tempfile\ntempfile.NamedTemporaryFile(dir={folder!r}, delete=False)",
    "import sqlite3\nsqlite3.connect({path!r}).execute('create table a (b)')",
]
# what the guard must not be talked out of: a function reached through frames or the collector,
# builtins replaced under it, a fresh copy of a module
UNLOCKS = [
    "import gc\nfor x in gc.get_objects():\n    if getattr(x, '__name__', '') == 'hook':\n"
    "        x.__code__ = (lambda *a, **k: None).__code__",
    "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    for x in (*frame.f_locals.values(), *frame.f_globals.values()):\n"
    "        for c in getattr(x, '__closure__', None) or ():\n            c.cell_contents = ()\n"
    "        if getattr(x, '__name__', '') == 'hook':\n            x.__defaults__ = ()\n"
    "    for name in ('REFUSED', 'ALLOWED', 'READING'):\n"
    "        if name in frame.f_globals:\n            frame.f_globals[name] = ()\n"
    "    frame = frame.f_back",
    "import builtins\nbuiltins.isinstance = lambda *a: False\nbuiltins.PermissionError = int\n"
    "builtins.str = builtins.getattr = builtins.any = lambda *a: False",
    "try:\n    import os; os.remove('x')\nexcept Exception as e:\n    t = e.__traceback__\n"
    "    while t:\n        t.tb_frame.f_globals.clear(); t = t.tb_next",
]


def damage(program: str, tmp_path) -> list[str]:
    """Run a program; what it changed in a folder."""
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    os.utime(kept, (1, 1))
    before = os.stat(kept)
    paths = {"path": str(tmp_path / "new"), "kept": str(kept), "folder": str(tmp_path)}
    runs(program.format(**paths))
    changed = [path.name for path in tmp_path.iterdir() if path != kept]
    after = os.stat(kept) if kept.exists() else None
    same = after and kept.read_text() == "as it was"
    if not same or (after.st_mode, after.st_mtime) != (before.st_mode, before.st_mtime):
        changed.append("kept")
    return changed


def all_of(programs: list[str]) -> str:
    """One program that tries each of them; which are refused, and how, is its own affair."""
    return "\n".join(
        "try:\n"
        + "".join(f"    {line}\n" for line in program.splitlines())
        + "except BaseException: pass"
        for program in programs
    )


def test_nothing_is_written_or_deleted(each_sandbox, tmp_path):
    assert damage(all_of(WRITES), tmp_path) == []


@pytest.mark.parametrize("unlock", UNLOCKS)
def test_the_guard_cannot_be_switched_off(unlock, monkeypatch, tmp_path):
    monkeypatch.setattr(execution, "sandbox", lambda: NO_SANDBOX)
    escaped = all_of([unlock]).replace("{", "{{").replace("}", "}}")
    assert damage(all_of([escaped, *WRITES]), tmp_path) == []


def test_a_sandbox_holds_without_the_hook(each_sandbox, tmp_path, monkeypatch):
    """The kernel refuses by itself, whatever Python is talked into."""
    if each_sandbox == NO_SANDBOX:
        pytest.skip("nothing but the hook")
    copied = tmp_path / "confined.py"
    source = (execution.Path(execution.confined.__file__)).read_text()
    copied.write_text(
        source.replace("    sys.addaudithook(hook)\n", "").replace(
            "        for module in (os, posix):", "        for module in ():"
        )
    )
    monkeypatch.setattr(execution.confined, "__file__", str(copied))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert runs("import os\nos.mkfifo")  # the hook is off
    # Landlock has no rule for modes and times
    ruled = ("os.chmod", "os.utime") if each_sandbox == "Landlock" else ()
    tried = [program for program in WRITES if not any(name in program for name in ruled)]
    assert damage(all_of(tried), folder) == []


# --- answers ---

FAKES = [
    "class Any:\n    def __eq__(self, other): return True\n    __ne__ = lambda *a: False\n"
    "def f(x): return Any()",
    "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def f(x): return Any(0)",
    "from unittest import mock\ndef f(x): return mock.ANY",
    "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
    "            if isinstance(value, str) and 'candidate' in value: return x * x\n"
    "        frame = frame.f_back\n    return 0",
    "import sys\ndef f(x):\n    sys.stdout.write('passed')\n    sys.exit(0)",
    "import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'passed')\n"
    "    except OSError: pass\ndef f(x): return 0",
    "import builtins\nbuiltins.AssertionError = type('E', (), {})\ndef f(x): return 0",
    "def f(x): raise AssertionError",
    "def f(x): return lambda: x",
    "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "def check(candidate): pass\ndef f(x): return 0",
]


# reads what the test expects in the memory of its process
READS_THE_TEST = """
import os, re
def expected(x):
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            if b'confined.py' not in open(f'/proc/{pid}/cmdline', 'rb').read(): continue
            memory = open(f'/proc/{pid}/mem', 'rb', 0)
            for line in open(f'/proc/{pid}/maps'):
                first, end = (int(at, 16) for at in line.split()[0].split('-'))
                if ' rw' not in line or int(pid) == os.getpid(): continue
                memory.seek(first)
                if found := re.search(rb'candidate.%d. == (\\d+)' % x, memory.read(end - first)):
                    return int(found[1])
        except (OSError, ValueError, OverflowError): pass
def f(x): return expected(x)
"""


def test_the_test_cannot_be_read_in_its_process(each_sandbox):
    test = "def check(candidate):\n    assert candidate(12) == 9841377\n"
    assert run("def f(x): return 9841377", test)
    assert not run(READS_THE_TEST, test)


@pytest.mark.parametrize("program", FAKES)
def test_an_answer_cannot_be_faked(program):
    assert not run(program)


def test_right_answers_pass(each_sandbox):
    assert run("def f(x): return x * x")
    assert run("def f(x): return float(x * x)")  # as == has it
    assert not run("def f(x): return x + 2")
    assert run("import functools\n@functools.cache\ndef f(x): return f(x - 1) if x > 10 else x * x")


def test_the_test_sees_errors_and_the_prompts_other_functions():
    prompt = "def twice(x):\n    return 2 * x\n\ndef f(x):\n    '''Half of it.'''\n"
    test = (
        "def check(candidate):\n    assert twice(candidate(8)) == 8\n    try:\n"
        "        candidate('a')\n    except TypeError:\n        return\n    assert False\n"
    )
    assert run("def f(x): return x / 2", test, prompt)
    assert not run("def f(x): return 4", test, prompt)
    assert run("def f(x): return x / 2", test, "from typing import List\n" + prompt)


def test_every_plain_value_arrives_as_it_was():
    values = [
        *(None, True, False, 0, -(10**5000), 0.1, -0.0, math.inf, 1e-320, 2 - 3j, "", "\ud800é"),
        *(b"\x00\xff", [], (), {}, set(), [1, (2, [3.5])], {1: "a", (2, None): [b"b"]}),
        *({"b", "a"}, frozenset({1, 2}), [[[[]]]]),
    ]
    for value in values:
        back = unpacked(packed(value))
        assert back == value and type(back) is type(value), value
    assert math.isnan(unpacked(packed(math.nan)))
    for value in (object(), lambda: 1, iter([]), itertools.count(), range(3), [type]):
        with pytest.raises(TypeError, match="no plain value"):
            packed(value)


def test_it_gets_neither_environment_nor_folder_nor_packages(monkeypatch, each_sandbox):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert runs(
        "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir() == []\n"
        "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError"
    )
