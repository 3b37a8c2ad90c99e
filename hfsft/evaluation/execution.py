"""Run a program that a model wrote, with little power over the machine; say if it ends well.

It stands between this machine and a program's mistakes: loops, forks, memory, disk, output,
network, writes and deletions. It is no jail for a program that is out to break it: Python's audit
hooks can be got round by whoever means to, and what the user may read it can read. Where malice is
to be feared, run `hfsft eval` in a container or a virtual machine.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache

SECONDS = 5  # of processor time; who sleeps is killed after three times as many


MEMORY = 1 << 30  # bytes of address space


# Runs within the child, before the program. Its own names are gone when the program begins.
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
    # what a solution of a puzzle has no use for; a hook cannot be taken away again
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
    """What gives a command no network, and processes that all end with it, if that can be had."""
    prefix = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return prefix if tried.returncode == 0 else ()


def ends_well(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program runs to its end without an error, as HumanEval's tests have it.

    The child is Python in isolated mode, with an empty environment, in an empty folder that is
    deleted. Its processor time, memory, open files and written files are limited, an audit hook
    refuses to start processes, open sockets, write, delete and load libraries, all that it prints
    goes nowhere, and where the kernel allows it, it has process and network namespaces of its own.
    That it ended is said with a number drawn anew each time: `sys.exit(0)` midway is no success.
    The method is that of openai/human-eval's execution.py, with the kernel's limits and an audit
    hook instead of functions set to None.

    Args:
        program: Python's source.
        seconds: of processor time.

    Raises:
        OSError: if no process can be started.
    """
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
