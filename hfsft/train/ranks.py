"""Several ranks: if one of them dies or is stopped, the others name it and exit.

Every second each rank writes a heartbeat to the process group's store, from a thread of its own,
and reads those of its peers. A collective alone does not notice: gloo sees a dead peer but not a
stopped one, and NCCL waits for ten minutes or more.

The store is the launcher's. While the launcher is stopped, as by Ctrl-Z, no rank is watched; when
it is gone, the stage saves a checkpoint and stops. Without torchrun (mpirun) rank 0 holds the
store, and a stopped rank 0 goes unnoticed. A rank in an endless loop counts as alive.
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

import psutil
from accelerate import PartialState
from torch.distributed import DistError, distributed_c10d

from hfsft import process
from hfsft.run.manifest import checkpoints

BEAT = 1.0  # seconds between heartbeats
# a peer counts as dead after this many of our heartbeats without one of its own: torchrun kills the
# other ranks 30 s after a death, and a thread may wait 13 s for the GIL (seen: np.unique of 30 M
# numbers on two busy cores)
SILENT = 25
STARVED = 300  # the same for a peer that /proc shows running: a long call can hold its GIL
LEFT = "left "  # a rank's last message, followed by its exit status


class Watchdog:
    """Watches the other ranks until this process ends."""

    def __init__(self, folder: Path, store: Any, rank: int, ranks: int):
        """Announce this rank to its peers.

        Args:
            folder: holds the stage's checkpoints.
            store: of the process group, over a connection of its own: calls on a shared one block.
            rank: of this process.
            ranks: the world size.
        """
        self.folder, self.store, self.rank = folder, store, rank
        self.peers = [peer for peer in range(ranks) if peer != rank]
        self.machine = _machine()
        self.identities: dict[int, dict[str, Any]] = {}  # rank → its process and host
        self.messages: dict[int, str] = {}  # rank → the last one: a heartbeat, or `LEFT`
        self.silent = dict.fromkeys(self.peers, 0)  # rank → our heartbeats since its last one
        self.has_left = False
        self.sending, self.ending, self.over = threading.Lock(), threading.Lock(), threading.Event()
        me = {"pid": os.getpid(), "host": platform.node(), "machine": self.machine}
        self.store.set(f"process {rank}", json.dumps(me | {"began": _proc(os.getpid())[1]}))

    def start(self) -> None:
        """Start watching, in a thread that ends with the process."""
        thread = threading.Thread(target=self._watch, name="hfsft-watchdog", daemon=True)

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the store may be gone already
                self._send(f"{LEFT}0")
            self.over.set()
            thread.join(
                process.PATIENCE
            )  # a thread inside torch would abort the interpreter's exit

        process.before_leaving = self.leave
        atexit.register(end)
        thread.start()

    def _watch(self) -> None:
        beats = 0
        while not self.over.wait(BEAT):
            beats += 1
            try:
                self._send(str(beats))
                self._read_peers()
            except RuntimeError:
                return self._handle_lost_store()
            for rank, silent in self.silent.items():
                # counted in our own heartbeats: a laptop's sleep, which stops all, is no silence
                if silent >= (STARVED if self._state(rank) in ("R", "S", "D") else SILENT):
                    self._exit_because_of(rank)

    def _handle_lost_store(self) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            if not self.over.wait(SILENT):  # this rank may be finishing just as rank 0 did
                self._exit_because_of(0)
            return
        print("hfsft: the launcher is gone", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.over.wait(STARVED):  # for the step and its checkpoint, unless that hangs
            os._exit(128 + signal.SIGTERM)

    def _send(self, message: str) -> None:
        with self.sending:
            if not self.has_left:
                self.has_left = message.startswith(LEFT)
                self.store.set(f"beat {self.rank}", message)

    def _received(self, what: str, rank: int) -> str:
        key = f"{what} {rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _read_peers(self) -> None:
        for rank in self.peers:
            if rank not in self.identities and (identity := self._received("process", rank)):
                self.identities[rank] = json.loads(identity)
            message = self._received("beat", rank)
            alive = message != self.messages.get(rank, "") and not message.startswith(LEFT)
            self.silent[rank] = 0 if alive or message == f"{LEFT}0" else self.silent[rank] + 1
            self.messages[rank] = message

    def _state(self, rank: int) -> str | None:
        """The /proc state letter of a rank's process, X if it is dead; None on another machine."""
        identity = self.identities.get(rank)
        if identity is None or self.machine is None or identity["machine"] != self.machine:
            return None
        state, began = _proc(identity["pid"])
        return "X" if state == "Z" or began != identity["began"] else state

    def leave(self, error: BaseException) -> bool:
        """Called before this process exits with an error; blames a peer where that is the cause.

        Args:
            error: of this process, such as a broken connection, or torchrun's SIGTERM.

        Returns:
            Whether to print it here: what every rank reports is printed once per machine.
        """
        broken = isinstance(error, DistError) or any(
            words in str(error).lower() for words in ("gloo", "nccl")
        )
        try:
            if broken or isinstance(error, process.Stopped):
                for _ in range(SILENT + 5 if broken else 1):
                    self._read_peers()
                    for rank in self.peers:
                        gone = self._state(rank) == "X" or self.messages[rank].startswith(LEFT)
                        if gone and self.messages[rank] != f"{LEFT}0":
                            self._exit_because_of(rank)
                    if broken:
                        self.over.wait(BEAT)  # the watching thread may find the cause
            interrupted = isinstance(error, KeyboardInterrupt)
            status = getattr(error, "exit_status", getattr(error, "code", 1))
            self._send(f"{LEFT}{130 if interrupted else status}")
            return self._is_first_to_print(f"{type(error).__name__}: {error}")
        except RuntimeError:  # the store is gone
            return True

    def _is_first_to_print(self, text: str) -> bool:
        try:
            return self.store.add(f"said {self.machine or self.rank} {text}", 1) == 1
        except RuntimeError:  # the store is gone
            return True

    def _exit_because_of(self, rank: int) -> None:
        """Exit this process at once: its main thread may be stuck in a collective."""
        self.ending.acquire()  # never released: another thread may come to the same conclusion
        message, state = self.messages.get(rank, ""), self._state(rank)
        identity = self.identities.get(rank, {"pid": "unknown", "host": "an unknown host"})
        status = 2
        how = f"has been silent for {self.silent[rank]} s"
        if message.startswith(LEFT):
            status, how = int(message.removeprefix(LEFT)), "has exited, and prints its own error"
        elif state == "X":
            how = "is dead"
        elif state in ("T", "t"):
            how = "was stopped, and is now killed"  # it would keep the folder's lock
            psutil.Process(identity["pid"]).kill()
        found = checkpoints(self.folder)
        newest = f"the newest checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        text = (
            f"hfsft: rank {rank} (process {identity['pid']} on {identity['host']}) {how}; "
            f"{newest}\n"
            f"  The same command {'resumes from it' if found else 'starts over'}"
        )
        prints_itself = message.startswith(LEFT) and state is not None
        if not prints_itself and self._is_first_to_print(text):
            print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            self._send(f"{LEFT}{status}")
        os._exit(status)


def _machine() -> str | None:
    """Identifies the processes that see each other's PIDs; None without `/proc`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _proc(pid: int) -> tuple[str, str]:
    """The state of a process and its start time, which tells a reused PID apart."""
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
