"""Runs in a child process of its own, confined: a model's program, or the test that calls it.

`execution.py` starts both. The program answers calls with plain values, the test compares them: the
test's process never runs a line of the program, and the program's never sees the test.

    python -I -S confined.py SANDBOX FOLDER SECONDS MEMORY program|test|probe [CALLS ANSWERS]

SANDBOX says what this process still has to do to be confined: "namespaces", "landlock" (whose
package is in FOLDER), or nothing.
"""

import builtins
import contextlib
import json
import os
import sys
from typing import Any, BinaryIO

LARGEST = 1 << 24  # bytes of one call or answer

# in the flags of an `open` that only reads; any other is refused
READING = 0
for _name in ("CLOEXEC", "NOFOLLOW", "NONBLOCK", "NOCTTY", "DIRECTORY", "LARGEFILE"):
    READING |= getattr(os, f"O_{_name}", 0)  # what this system has of them

# audit events that no solution needs, by their beginnings
REFUSED = (
    *("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "resource.", "signal."),
    *("tempfile.", "webbrowser.", "ftplib.", "smtplib.", "urllib.", "mmap.", "fcntl.", "syslog."),
    *("sqlite3.", "glob.", "_posixsubprocess.", "gc.", "sys.addaudithook"),
    *("sys.settrace", "sys.setprofile"),
)
ALLOWED = frozenset(("os.listdir", "os.scandir", "os.getxattr", "os.listxattr"))

# of `os`, what creates something or leaves the sandbox without an audit event
SILENT = ("mkfifo", "mknod", "chroot", "unshare", "setns", "sethostname", "openpty", "posix_openpt")


# --- confining this process ---


def limit(seconds: int, memory: int) -> None:
    """Limit processor time, memory, files and processes."""
    import resource  # which Windows, where this module is imported too, does not have

    for name, most in (
        *(("CPU", seconds), ("AS", memory), ("DATA", memory), ("FSIZE", 4096)),
        *(("NOFILE", 64), ("NPROC", 0), ("CORE", 0)),
    ):
        with contextlib.suppress(ValueError, OSError):  # lower already
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))


def enter(sandbox: str, folder: str) -> None:
    """Make every file read-only for this process, for good.

    Args:
        sandbox: "namespaces" in a mount namespace of our own, "landlock", or "" for neither.
        folder: holds the package `landlock`.

    Raises:
        OSError: if the kernel refuses.
    """
    if sandbox == "namespaces":
        _lock_mounts()
    elif sandbox == "landlock":
        sys.path.insert(0, folder)
        from landlock import FSAccess, Ruleset

        rules = Ruleset()
        rules.allow("/", rules=FSAccess.READ_FILE | FSAccess.READ_DIR | FSAccess.EXECUTE)
        rules.allow(os.devnull, rules=FSAccess.READ_FILE | FSAccess.WRITE_FILE)
        rules.apply()
        sys.path.remove(folder)
    if sys.platform == "linux":
        _give_up_rights()
    # a program that imports ctypes loads a library, which is refused
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "landlock")]:
        del sys.modules[name]
    sys.modules.pop("_ctypes", None)


def _lock_mounts() -> None:
    """Turn every mount read-only; without capabilities nothing can undo it."""
    import ctypes

    # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, {attr_set: MOUNT_ATTR_RDONLY}), from Linux 5.12 on;
    # its number is the same on every architecture
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)
    _call("syscall", 442, -100, b"/", 0x8000, ctypes.byref(attributes), 32)


def _give_up_rights() -> None:
    """Drop every capability for good, and let no other process read this one's memory.

    A program could read the answers that its test expects, where both run as one user.
    """
    import ctypes

    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    _call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: 0


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library.

    Raises:
        OSError: if it fails.
    """
    import ctypes

    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "not confined")


def refuse_by_hook() -> None:
    """Refuse to write, start processes or use the network, by an audit hook that stays.

    The hook looks nothing up by name, and nothing that a program can reach refers to it.
    """
    import posix

    for name in SILENT:
        for module in (os, posix):
            if hasattr(module, name):
                delattr(module, name)

    def hook(
        event: str,
        arguments: tuple[Any, ...],
        refused: tuple[str, ...] = REFUSED,
        allowed: frozenset[str] = ALLOWED,
        others: int = ~READING,
        error: type[Exception] = PermissionError,
    ) -> None:
        if event.startswith(refused) and event not in allowed:
            raise error(event)
        if event == "open" and arguments[2] & others:
            raise error("open to write")

    sys.addaudithook(hook)


# --- values between the two processes ---


def packed(value: Any) -> Any:
    """A value of builtin types as JSON data; subclasses become their builtin type.

    Raises:
        TypeError: if it is of any other type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[packed(key), packed(held)] for key, held in dict.items(value)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [packed(held) for held in kind.__iter__(value)]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def unpacked(data: Any) -> Any:
    """The value that `packed` made JSON data of.

    Raises:
        ValueError, TypeError, KeyError: if it is not of that form.
    """
    if data is None or isinstance(data, bool | str):
        return data
    ((kind, held),) = data.items()
    if kind == "int":
        return int(held, 16)
    if kind == "float":
        return float.fromhex(held)
    if kind == "complex":
        return complex(*map(float.fromhex, held))
    if kind == "bytes":
        return bytes.fromhex(held)
    if kind == "dict":
        return {unpacked(key): unpacked(value) for key, value in held}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](unpacked(value) for value in held)


def send(stream: BinaryIO, data: Any) -> None:
    """Write one message: its length in eight bytes, then JSON."""
    text = json.dumps(data).encode()
    stream.write(len(text).to_bytes(8) + text)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read one message.

    Raises:
        EOFError: if there is none, or it is too large.
    """
    size = int.from_bytes(stream.read(8))
    text = stream.read(size) if 0 < size <= LARGEST else b""
    if not text or len(text) < size:
        raise EOFError
    return json.loads(text)


# --- the two sides ---


def answer_calls(calls: BinaryIO, answers: BinaryIO) -> None:
    """Run a program, then answer the calls of one of its functions until there are no more."""
    source = receive(calls)
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(source["program"], "program", "exec"), names)
    function = names[source["entry_point"]]
    while True:
        arguments, keywords = unpacked(receive(calls))
        try:
            answer = {"value": packed(function(*arguments, **keywords))}
        except Exception as error:
            answer = {"error": type(error).__name__}
        send(answers, answer)


def run_test(sources: BinaryIO, calls: BinaryIO, answers: BinaryIO) -> None:
    """Run HumanEval's `check` with a function that asks the program's process for each answer."""
    source = receive(sources)

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        send(calls, packed((arguments, keywords)))
        answer = receive(answers)
        if "value" in answer:
            return unpacked(answer["value"])
        error = getattr(builtins, str(answer["error"]), None)
        known = isinstance(error, type) and issubclass(error, Exception)
        raise (error if known else RuntimeError)("raised by the program")

    names: dict[str, Any] = {"__name__": "test"}
    try:
        # some tests use functions that the prompt defines
        exec(compile(source["prompt"], "prompt", "exec"), names)
    except Exception:
        names = {"__name__": "test"}
    names[source["entry_point"]] = candidate
    exec(compile(source["test"], "test", "exec"), names)
    names["check"](candidate)


def main() -> None:
    """Confine this process, then do what its command line says."""
    sandbox, folder, seconds, memory, side, *pipes = sys.argv[1:]
    enter(sandbox, folder)
    if side == "probe":
        os.mkdir("made")  # must fail
        return
    given, result = (os.fdopen(os.dup(number), mode) for number, mode in ((0, "rb"), (1, "wb")))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    limit(int(seconds), int(memory))
    if side == "program":
        refuse_by_hook()
        answer_calls(given, result)
    calls, answers = (
        os.fdopen(int(pipe), mode) for pipe, mode in zip(pipes, ("wb", "rb"), strict=True)
    )
    refuse_by_hook()
    run_test(given, calls, answers)
    result.write(b"passed")
    result.flush()


if __name__ == "__main__":
    main()
