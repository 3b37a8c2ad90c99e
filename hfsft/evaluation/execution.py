"""Run a program that a model wrote, confined, and tell whether it passes its test.

Program and test run in two processes, each in the best sandbox that this machine has and under
limits of time, memory and output. The program's answers reach the test as plain values, so an
object that equals everything is no answer, and there is no grader in its process to read or change.

An audit hook refuses writes, processes and the network in any case. Alone, without one of the
sandboxes, it guards against a program's mistakes, but not against malice: then run `hfsft eval` in
a container or a virtual machine. What the user can read, a program can read too, though it has no
way to send it anywhere.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfsft.errors import HfsftError
from hfsft.evaluation import confined

SECONDS = 5  # of CPU time; a sleeping program is killed after three times as many


MEMORY = 1 << 30  # bytes of address space


BWRAP = (
    *("bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--unshare-all", "--die-with-parent"),
    *("--new-session", "--cap-drop", "ALL"),
)


UNSHARE = (
    *("unshare", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork"),
    "--kill-child",
)


# name → the command that starts it, and what is left to do in the child (see `confined.enter`)
SANDBOXES = {
    "bubblewrap": (BWRAP, ""),
    "user namespaces": (UNSHARE, "namespaces"),
    "Landlock": ((), "landlock"),
}


NO_SANDBOX = "no sandbox (an audit hook alone; install bubblewrap or the package landlock)"


@cache
def sandbox() -> str:
    """The best sandbox that works here: a name in `SANDBOXES`, or `NO_SANDBOX`.

    Each is tried: a child in it must be able to start and unable to make a folder.
    """
    for name, (prefix, _) in SANDBOXES.items():
        if prefix and shutil.which(prefix[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                tried = subprocess.run(
                    _command(name, SECONDS, "probe"),
                    capture_output=True,
                    text=True,
                    timeout=10,
                    cwd=folder,
                    env={"PATH": os.defpath},
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            if "'made'" in tried.stderr and not os.listdir(folder):
                return name
    return NO_SANDBOX


def _command(name: str, seconds: int, *side: str) -> list[str]:
    """The command of a child: its sandbox, then Python in isolated mode without packages."""
    prefix, inside = SANDBOXES.get(name, ((), ""))
    if prefix:  # the child has a PATH of its own
        prefix = (shutil.which(prefix[0]) or prefix[0], *prefix[1:])
    found = find_spec("landlock") if inside == "landlock" else None
    folder = str(Path(found.origin).parents[1]) if found else ""
    arguments = [inside, folder, str(seconds), str(MEMORY), *side]
    return [*prefix, sys.executable, "-I", "-S", "-B", confined.__file__, *arguments]


def passes(program: str, entry_point: str, prompt: str, test: str, seconds: int = SECONDS) -> bool:
    """Whether a program passes a test of HumanEval's form, its criterion for a right answer.

    Args:
        program: Python source that defines the function.
        entry_point: the function's name.
        prompt: Python source whose other functions the test may use.
        test: Python source that defines `check(candidate)`.
        seconds: of CPU time, for program and test each.

    Raises:
        HfsftError: on Windows, which has no such limits.
        OSError: if no process can be started.
    """
    if find_spec("resource") is None:
        raise HfsftError("a model's programs run within limits that Windows lacks; use WSL")
    names = {"entry_point": entry_point}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        calls, asking = _pipe(stack)
        hearing, answers = _pipe(stack)
        sources, giving = _pipe(stack)
        command = _command(sandbox(), seconds, "program")
        stack.enter_context(_child(command, folder, calls, answers))
        pipes = (asking.fileno(), hearing.fileno())
        command = _command(sandbox(), seconds, "test", *map(str, pipes))
        result = stack.enter_context(tempfile.TemporaryFile())
        tester = stack.enter_context(_child(command, folder, sources, result, pipes))
        for ours in (calls, answers, sources):
            ours.close()  # if a child ends, the other side of its pipes must notice
        with contextlib.suppress(OSError, EOFError):
            encodable = program.encode(errors="replace").decode()
            confined.send(asking, names | {"program": encodable})
            asking.close()
            hearing.close()
            confined.send(giving, names | {"prompt": prompt, "test": test})
            giving.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            tester.wait(3 * seconds)
        result.seek(0)
        return result.read(7) == b"passed"


def _pipe(stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """The two ends of a pipe, for reading and for writing; closed with the stack."""
    ends = os.pipe()
    reading, writing = (
        os.fdopen(end, mode, 0) for end, mode in zip(ends, ("rb", "wb"), strict=True)
    )
    return stack.enter_context(reading), stack.enter_context(writing)


@contextlib.contextmanager
def _child(
    command: list[str], folder: str, stdin: Any, stdout: Any, pipes: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process with an empty environment; it and what it started is killed at the end."""
    child = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": os.defpath},
        start_new_session=True,
        pass_fds=pipes,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
