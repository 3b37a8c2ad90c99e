"""Several processes: when one of them dies or is stopped, the others name it and end.

Each process (a rank) says every second in the process group's store that it lives, from a thread of
its own, and looks whether the others do. What a rank waits for in a collective may never come:
gloo notices a peer that is dead, but none that is stopped; NCCL waits for ten minutes and more.

The store is the launcher's. While that is stopped, as by Ctrl-Z, nobody is watched; when it is
gone, the stage stops with a checkpoint. Without torchrun (mpirun) rank 0 holds the store, and its
being stopped goes unnoticed. A rank in an endless loop lives.
"""

import atexit
import contextlib
import json
import os
import platform
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.distributed import DistError, distributed_c10d

from hfsft import process
from hfsft.run.checkpoint import checkpoints

BEAT = 1.0  # seconds


# beats of ours without one of another's: torchrun kills the ranks that are left 30 s after a death,
# and a thread may wait 13 s for the interpreter (seen: np.unique of 30 M numbers, both cores busy)
SILENT = 25


STARVED = 300  # of a rank that this machine shows running: a long call keeps its thread waiting


LEFT = "left "  # a rank's last word, with its exit status behind it


class Watchdog:
    """Watches the other ranks until this process ends."""

    def __init__(self, folder: Path, store: Any, rank: int, ranks: int):
        """Tell the others who this is.

        Args:
            folder: holds the stage's checkpoints.
            store: of the process group, by a connection of its own: another's call may wait in it.
            rank: this process.
            ranks: how many there are.
        """
        self.folder, self.store, self.rank = folder, store, rank
        self.others = [other for other in range(ranks) if other != rank]
        self.machine = _machine()
        self.processes: dict[int, dict[str, Any]] = {}  # rank → what it told of itself
        self.words: dict[int, str] = {}  # rank → its last one
        self.silent = dict.fromkeys(self.others, 0)  # rank → beats of ours
        self.has_left = False
        self.telling, self.ending, self.over = threading.Lock(), threading.Lock(), threading.Event()
        me = {"pid": os.getpid(), "host": platform.node(), "machine": self.machine}
        self.store.set(f"process {rank}", json.dumps(me | {"began": _proc(os.getpid())[1]}))

    def start(self) -> None:
        """Begin to watch, in a thread that ends with the process."""
        thread = threading.Thread(target=self._watch, name="hfsft-watchdog", daemon=True)

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the store may be gone already
                self._tell(f"{LEFT}0")
            self.over.set()
            thread.join(process.PATIENCE)  # within torch, the interpreter's end would abort it

        process.before_leaving = self.leave
        atexit.register(end)
        thread.start()

    def _watch(self) -> None:
        beats = 0
        while not self.over.wait(BEAT):
            beats += 1
            try:
                self._tell(str(beats))
                self._look()
            except RuntimeError:
                return self._store_is_gone()
            for rank, silent in self.silent.items():
                # counted in beats of ours: a laptop's sleep, which stops all, is no silence
                if silent >= (STARVED if self._state(rank) in ("R", "S", "D") else SILENT):
                    self._end_with(rank)

    def _store_is_gone(self) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            if not self.over.wait(SILENT):  # this process may be at its end as rank 0 was
                self._end_with(0)
            return
        print("hfsft: the launcher is gone", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.over.wait(STARVED):  # for the step and its checkpoint, unless that hangs
            os._exit(128 + signal.SIGTERM)

    def _tell(self, word: str) -> None:
        with self.telling:
            if not self.has_left:
                self.has_left = word.startswith(LEFT)
                self.store.set(f"beat {self.rank}", word)

    def _told(self, what: str, rank: int) -> str:
        key = f"{what} {rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _look(self) -> None:
        for rank in self.others:
            if rank not in self.processes and (told := self._told("process", rank)):
                self.processes[rank] = json.loads(told)
            word = self._told("beat", rank)
            lives = word != self.words.get(rank, "") and not word.startswith(LEFT)
            self.silent[rank] = 0 if lives or word == f"{LEFT}0" else self.silent[rank] + 1
            self.words[rank] = word

    def _state(self, rank: int) -> str | None:
        """The system's letter for a rank's process, X if it is dead; None: it is elsewhere."""
        process = self.processes.get(rank)
        if process is None or self.machine is None or process["machine"] != self.machine:
            return None
        state, began = _proc(process["pid"])
        return "X" if state == "Z" or began != process["began"] else state

    def leave(self, error: BaseException) -> bool:
        """Before this process ends with an error: end with another's where that is the cause.

        Args:
            error: of this process; a broken connection, or torchrun's SIGTERM to those left over.

        Returns:
            Whether it is to be said here: what every rank has is said once on a machine.
        """
        broken = isinstance(error, DistError) or any(
            words in str(error).lower() for words in ("gloo", "nccl")
        )
        try:
            if broken or isinstance(error, process.Stopped):
                for _ in range(SILENT + 5 if broken else 1):
                    self._look()
                    for rank in self.others:
                        gone = self._state(rank) == "X" or self.words[rank].startswith(LEFT)
                        if gone and self.words[rank] != f"{LEFT}0":
                            self._end_with(rank)
                    if broken:
                        self.over.wait(BEAT)  # for the other thread's verdict
            interrupted = isinstance(error, KeyboardInterrupt)
            status = getattr(error, "exit_status", getattr(error, "code", 1))
            self._tell(f"{LEFT}{130 if interrupted else status}")
            return self._is_first_to_say(f"{type(error).__name__}: {error}")
        except RuntimeError:  # the store is gone
            return True

    def _is_first_to_say(self, words: str) -> bool:
        try:
            return self.store.add(f"said {self.machine or self.rank} {words}", 1) == 1
        except RuntimeError:  # the store is gone
            return True

    def _end_with(self, rank: int) -> None:
        """End this process, whose main thread may never come back from a collective."""
        self.ending.acquire()  # for good: another thread has come to the same end
        word, state = self.words.get(rank, ""), self._state(rank)
        process = self.processes.get(rank, {"pid": "unknown", "host": "an unknown host"})
        status = 2
        how = f"has been silent for {self.silent[rank]} s"
        if word.startswith(LEFT):
            status, how = int(word.removeprefix(LEFT)), "has ended, and says there why"
        elif state == "X":
            how = "is dead"
        elif state in ("T", "t"):
            how = "is stopped, and was killed"  # it would keep the folder's lock, and the launcher
            os.kill(process["pid"], signal.SIGKILL)
        found = checkpoints(self.folder)
        good = f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        said = (
            f"hfsft: rank {rank} (process {process['pid']} on {process['host']}) {how}; {good}\n"
            f"  The same command {'goes on from there' if found else 'begins anew'}"
        )
        said_already = word.startswith(LEFT) and state is not None
        if not said_already and self._is_first_to_say(said):
            print(said, file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            self._tell(f"{LEFT}{status}")
        os._exit(status)


def _machine() -> str | None:
    """What processes share that see each other's numbers; None where there is no `/proc`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _proc(pid: int) -> tuple[str, str]:
    """A process' state and when it began, which tells it from a later one of the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]


def watch_ranks(folder: Path) -> None:
    """Watch the other ranks from now on, if there are any.

    Args:
        folder: holds the stage's checkpoints.
    """
    state = PartialState()
    if state.num_processes > 1:
        store = distributed_c10d._get_default_store().clone()
        Watchdog(folder, store, state.process_index, state.num_processes).start()
