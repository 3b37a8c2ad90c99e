"""Signals and errors of a process: one or two lines on standard error, and an exit status."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable

from hfsft.errors import HfsftError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


PATIENCE = 5.0  # seconds for a process to answer a signal, and again for its end


class Stopped(SystemExit):
    """SIGTERM or SIGHUP outside the training loop; no library takes it for an error of its own."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


def _say_it(error: BaseException) -> bool:
    return True


# asked before the process ends with an error, whether to say it; of several processes, one says
# what all have, and the end of another may be why (`train/ranks.py`)
before_leaving: Callable[[BaseException], bool] = _say_it


def run_main(main: Callable[..., None], *argv: str) -> None:
    """Run `main(*argv)` as a process does: exit with the status and the words of its error.

    SIGINT, SIGTERM and SIGHUP end it with one line, unless it takes them over or was started to
    ignore them, as nohup does with SIGHUP.

    Args:
        main: a stage's or a command's entry point.
        argv: the command line without the program's name.

    Raises:
        SystemExit: with the `exit_status` of an `HfsftError`, or 128 + a signal's number.
    """
    # imports make a million objects: at the default of 700, collecting takes 0.7 s of their 4 s
    gc.set_threshold(50_000)
    _take_signals()
    try:
        main(*argv)
    except HfsftError as error:
        _leave(error, str(error), error.exit_status)
    except KeyboardInterrupt as error:
        _leave(error, "interrupted", 130)
    except Stopped as error:
        _leave(error, str(error), error.code)
    except Exception as error:
        before_leaving(error)
        raise


def unignored() -> list[signal.Signals]:
    """The signals that stop a process, but for those it was started to ignore."""
    return [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]


def _take_signals() -> None:
    """Let signals raise in the main thread; where that is in a long call into C, end the process.

    Python runs a handler only once such a call is over: the training of a tokenizer, or the waiting
    for another process. A thread hears of the signal at once.
    """
    process, answered = os.getpid(), threading.Event()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != process:  # a forked helper ends as it would without all this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        answered.set()
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def watch() -> None:
        while True:
            number = os.read(reading, 1)[0]
            # the training loop answers in its own time
            ours = number in STOPPING and signal.getsignal(number) is stop
            if ours and not answered.wait(PATIENCE):
                if before_leaving(error := Stopped(number)):
                    print(f"hfsft: {error}", file=sys.stderr, flush=True)
                os._exit(error.code)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # a helper that is stopped must not be taken for this process
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    for number in unignored():
        signal.signal(number, stop)
    threading.Thread(target=watch, name="hfsft-signals", daemon=True).start()


def _leave(error: BaseException, words: str, status: int) -> None:
    """End the process; a second signal, which launchers send, changes nothing any more."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if status > 128:  # a thread that reads from the network holds it up no longer than this
        end = threading.Timer(PATIENCE, os._exit, (status,))
        end.daemon = True
        end.start()
    if before_leaving(error):
        print(f"hfsft: {words}", file=sys.stderr, flush=True)
    sys.exit(status)
