"""Signals and errors of a process: a few lines on standard error, and the exit status."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from hfsft.errors import DISK_ERRNOS, HfsftError, first_line, panics_as, printable

# Windows has no SIGHUP
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


PARENT = os.getppid()  # as this process began: a launcher, if there is one
PATIENCE = 5.0  # seconds that a process gets to handle a signal, and again to exit


class Stopped(SystemExit):
    """SIGTERM or SIGHUP outside the training loop; `except Exception` does not catch it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


def _always_print(error: BaseException) -> bool:
    return True


# called with the error that ends this process; returns whether to print it. With several ranks only
# one prints an error that all of them have, and a rank's failure may be due to another's exit
# (`train/ranks.py` replaces this)
before_leaving: Callable[[BaseException], bool] = _always_print


def run_main(main: Callable[..., None], *argv: str) -> None:
    """Run `main(*argv)`, and on an error print its message and exit with its status.

    SIGINT, SIGTERM and SIGHUP end the process with one line, unless `main` handles them itself or
    the process was started with them ignored, as nohup does with SIGHUP.

    Args:
        main: the entry point of a stage or command.
        argv: the command line without the program name.

    Raises:
        SystemExit: with the `exit_status` of an `HfsftError`, or 128 plus the signal number.
    """
    # a stage imports a million objects, and collecting garbage would take 1.1 s on top of 4 s; its
    # `open_stage` and every command of `hfsft` turn collection on again
    gc.disable()
    install_handlers()
    try:
        with panics_as(HfsftError, "a text cannot be tokenized"):
            main(*argv)
    except HfsftError as error:
        _leave(error, str(error), error.exit_status)
    except KeyboardInterrupt as error:
        _leave(error, "interrupted", 130)
    except Stopped as error:
        _leave(error, str(error), error.code)
    except OSError as error:
        if error.errno not in DISK_ERRNOS or error.filename is None:
            before_leaving(error)
            raise
        _leave(error, first_line(error), HfsftError.exit_status)
    except Exception as error:
        before_leaving(error)
        error.add_note("`hfsft doctor` checks what hfsft builds on; its output belongs in a report")
        raise


def unignored() -> list[signal.Signals]:
    """The stop signals, except those that the process was started to ignore."""
    return [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]


def install_handlers() -> None:
    """Raise on the first signal in the main thread; end the process if that is stuck in C code.

    A second signal changes nothing until `PATIENCE` is over. While modules are imported, a signal
    ends the process at once: nothing is to be cleaned up, and an import may lose the exception.
    Python runs a handler only after such a call returns: the training of a tokenizer, or a wait for
    another process. The wakeup file descriptor tells a thread about the signal immediately.
    """
    process, handled = os.getpid(), threading.Event()

    def leave_at_once(number: int) -> None:
        if before_leaving(error := Stopped(number)):
            said = "interrupted" if number == signal.SIGINT else error
            print(f"hfsft: {said}", file=sys.stderr, flush=True)
        os._exit(error.code)

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child keeps the default behaviour
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if handled.is_set():  # the first one unwinds; raising again would end in a traceback
            return
        handled.set()
        if _is_importing(frame):
            leave_at_once(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def watch() -> None:
        while True:
            number = os.read(reading, 1)[0]
            # the training loop has its own handler, which may take a step's time
            if number not in STOPPING or signal.getsignal(number) is not stop:
                continue
            if not handled.wait(PATIENCE):
                leave_at_once(number)
            # a second signal: what unwinds gets as long again, since it may wait for ever
            end = threading.Timer(PATIENCE, leave_at_once, (number,))
            end.daemon = True
            if second:
                end.start()
            second.append(number)

    second: list[int] = []
    reading, writing = os.pipe()
    if hasattr(os, "set_blocking"):  # not on Windows before Python 3.12
        os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        # a signal to a forked child must not wake this process's thread
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    for number in unignored():
        signal.signal(number, stop)
    threading.Thread(target=watch, name="hfsft-signals", daemon=True).start()


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is in the middle of an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave(error: BaseException, message: str, status: int) -> None:
    """Print the message and exit; the second signal that launchers send is ignored."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if status > 128:  # a thread blocked on the network must not delay the exit any longer
        end = threading.Timer(PATIENCE, os._exit, (status,))
        end.daemon = True
        end.start()
    if before_leaving(error):
        print(f"hfsft: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(status)
