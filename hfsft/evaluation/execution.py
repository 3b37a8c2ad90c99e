"""Run a program that a model wrote under tight limits, and tell whether it succeeds.

The limits guard against a program's mistakes: endless loops, forks, memory, disk, output, network,
writes and deletions. They are no sandbox against malice: Python's audit hooks can be circumvented
on purpose, and the program can read whatever the user can. If malicious programs are a concern, run
`hfsft eval` in a container or a virtual machine.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec

from hfsft.errors import HfsftError

SECONDS = 5  # of CPU time; a sleeping program is killed after three times as many


MEMORY = 1 << 30  # bytes of address space


# Runs in the child before the program, which does not see the names defined here.
GUARD = """
import os, sys, resource

def guard():
    source = sys.stdin.buffer.read().decode()
    ending, program = source.split("\\n", 1)
    result = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for name, most in (
        ("CPU", SECONDS), ("AS", MEMORY), ("DATA", MEMORY), ("FSIZE", 4096), ("NOFILE", 64),
        ("NPROC", 0), ("CORE", 0),
    ):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        except (ValueError, OSError):
            pass
    # audit events that no solution needs; a hook cannot be removed
    refused = (
        "os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "resource.", "signal.",
        "tempfile.", "webbrowser.", "ftplib.", "smtplib.", "urllib.", "mmap.", "fcntl.", "syslog.",
        "sqlite3.", "glob.", "_posixsubprocess.",
    )
    reading = ("os.listdir", "os.scandir", "os.getxattr", "os.listxattr")

    def hook(event, arguments):
        if event.startswith(refused) and event not in reading:
            raise PermissionError(event)
        if event == "open":
            path, mode, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise PermissionError("open to write")

    sys.addaudithook(hook)
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    os.write(result, ending.encode())

guard()
"""


@cache
def _own_namespaces() -> tuple[str, ...]:
    """A command prefix without network, whose processes all die with it; () if not permitted."""
    prefix = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return prefix if tried.returncode == 0 else ()


def succeeds(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program runs to its end without an error, the criterion of HumanEval's tests.

    The child is Python in isolated mode, with an empty environment, in a temporary folder. Its CPU
    time, memory, open files and written files are limited; an audit hook refuses to start
    processes, open sockets, write, delete, or load libraries; its output is discarded; and where
    the kernel permits it, the child has its own process and network namespaces. Success is reported
    by a random token that the child writes last, so `sys.exit(0)` midway is a failure. The method
    is that of openai/human-eval's execution.py, with resource limits and an audit hook instead of
    functions set to None.

    Args:
        program: Python source.
        seconds: of CPU time.

    Raises:
        HfsftError: on Windows, which has no such limits.
        OSError: if no process can be started.
    """
    if find_spec("resource") is None:
        raise HfsftError("a model's programs run within limits that Windows lacks; use WSL")
    ending = secrets.token_hex(16)
    limits = f"SECONDS, MEMORY = {seconds}, {MEMORY}\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as result:
        child = subprocess.Popen(
            [*_own_namespaces(), sys.executable, "-I", "-S", "-B", "-c", limits + GUARD],
            stdin=subprocess.PIPE,
            stdout=result,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            given = f"{ending}\n{program}".encode(errors="replace")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(given, timeout=3 * seconds)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        result.seek(0)
        return result.read(len(ending) + 1) == ending.encode()
