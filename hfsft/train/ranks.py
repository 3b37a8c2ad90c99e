"""Several ranks: if one of them dies or is stopped, the others name it and exit.

Every second each rank writes a heartbeat to the process group's store, from a thread of its own,
and reads those of its peers. A collective alone does not notice: gloo sees a dead peer but not a
stopped one, and NCCL waits for half an hour.

The store is held by the launcher of machine 0, or without torchrun (mpirun) by rank 0. A call on it
blocks while its holder is stopped or unplugged, so a second thread counts how long that lasts. When
a launcher is gone, the stage saves a checkpoint and stops. A rank in an endless loop counts as
alive.
"""

import atexit
import contextlib
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from torch.distributed import DistError, distributed_c10d

from hfsft import process
from hfsft.errors import Interrupted, printable
from hfsft.process_group import machine
from hfsft.run.manifest import checkpoints

BEAT = 1.0  # seconds between heartbeats
JOIN_POLL = 3.0  # seconds between looks at the launchers while the process group is made
STORE_POLL = 0.1  # seconds between looks at who still needs the store
# a peer counts as dead after this many of our heartbeats without one of its own: torchrun kills the
# other ranks 30 s after a death, and a thread may wait 13 s for the GIL (seen: np.unique of 30 M
# numbers on two busy cores)
SILENT = 25
STARVED = 300  # the same for a peer that /proc shows running: a long call can hold its GIL
LAST_STEP = 40  # seconds that a step and its checkpoint get once a launcher is gone
LEFT = "left "  # a rank's last message, followed by its exit status
LOST = "lost"  # the key that says whose launcher is gone
FAILED = 2  # the exit status when another process failed


class Watchdog:
    """Watches the other ranks and the launchers until this process ends."""

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
        self.beats = 0
        self.has_left = False
        self.lost = ""  # whose launcher is gone
        self.sending, self.ending, self.over = threading.Lock(), threading.Lock(), threading.Event()
        me = {"pid": os.getpid(), "host": platform.node(), "machine": self.machine}
        self.identities[rank] = me | {"began": _proc(os.getpid())[1]}
        self.store.set(f"process {rank}", json.dumps(self.identities[rank]))
        if rank and self.store.check(["process 0"]):
            self._read_identity(0)

    def start(self) -> None:
        """Start watching, in threads that end with the process."""
        threads = [
            threading.Thread(target=run, name=f"hfsft-{run.__name__}", daemon=True)
            for run in (self._watch, self._watch_store)
        ]

        def end() -> None:
            if not self.lost:
                with contextlib.suppress(RuntimeError):  # the store may be gone already
                    self._send(f"{LEFT}0")
                    self._keep_store()
            self.over.set()
            for thread in threads:  # a thread inside torch would abort the interpreter's exit
                thread.join(process.PATIENCE)

        process.before_leaving = self.leave
        atexit.register(end)
        for thread in threads:
            thread.start()

    # --- watching ---

    def _watch(self) -> None:
        while not self.over.wait(BEAT):
            try:
                self._send(str(self.beats + 1))
                self._read_peers()
            except RuntimeError:
                return self._handle_lost_store()
            self.beats += 1
            if _has_launcher() and os.getppid() != process.PARENT:
                host = platform.node()
                return self._stop_without_launcher(f"rank {self.rank} (on {host})")
            for rank, silent in self.silent.items():
                # counted in our own heartbeats: a laptop's sleep, which stops all, is no silence
                if silent >= (STARVED if self._state(rank) in ("R", "S", "D") else SILENT):
                    self._exit_because_of(rank)

    def _watch_store(self) -> None:
        """Exit if the store answers no more; calls on it have no time-out of their own."""
        blocked, before = 0, 0
        while not self.over.wait(BEAT):
            blocked = 0 if self.beats != before else blocked + 1
            before = self.beats
            if blocked >= SILENT and not self.lost:
                why = f"{self._holder()} has been silent for {blocked} s"
                self._exit(why, answers=False)

    def _holder(self) -> str:
        """Who holds the store, for a message."""
        first = self.identities.get(0, {"pid": "unknown", "host": "an unknown host"})
        what = f"rank 0 (process {first['pid']})"
        if _has_agent_store():
            what = "the launcher of machine 0"
        return f"{what} on {first['host']}"

    def _handle_lost_store(self) -> None:
        if _has_agent_store():
            self._stop_without_launcher("machine 0")
        elif not self.over.wait(SILENT):  # this rank may be finishing just as rank 0 did
            self._exit_because_of(0)

    def _stop_without_launcher(self, whose: str) -> None:
        """Stop every rank with a checkpoint, and exit after `LAST_STEP` seconds if one hangs."""
        self.lost = f"the launcher of {whose} is gone"
        with contextlib.suppress(RuntimeError):
            self.store.set(LOST, self.lost)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.over.wait(LAST_STEP):
            self._exit(f"{self.lost}, silent for {LAST_STEP} s")

    def _send(self, message: str) -> None:
        with self.sending:
            if not self.has_left:
                self.has_left = message.startswith(LEFT)
                self.store.set(f"beat {self.rank}", message)

    def _received(self, what: str, rank: int) -> str:
        key = f"{what} {rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _read_identity(self, rank: int) -> None:
        if rank not in self.identities and (identity := self._received("process", rank)):
            self.identities[rank] = json.loads(identity)

    def _read_peers(self) -> None:
        for rank in self.peers:
            self._read_identity(rank)
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

    # --- leaving ---

    def _keep_store(self) -> None:
        """Where this rank holds the store, stay until no peer needs it any more."""
        if self.rank or _has_agent_store():
            return
        for _ in range(int(SILENT / STORE_POLL)):
            if all(map(self._is_gone, self.peers)):
                return
            time.sleep(STORE_POLL)

    def _is_gone(self, rank: int) -> bool:
        """Whether a peer has said that it leaves, or is dead."""
        return self._received("beat", rank).startswith(LEFT) or self._state(rank) == "X"

    def leave(self, error: BaseException) -> bool:
        """Called before this process exits with an error; blames a peer where that is the cause.

        Args:
            error: of this process, such as a broken connection, or torchrun's SIGTERM.

        Returns:
            Whether to print it here: what every rank reports is printed once per machine.
        """
        if threading.current_thread() is threading.main_thread():
            for number in process.STOPPING:  # torchrun's SIGTERM must not change the exit status
                signal.signal(number, signal.SIG_IGN)
        broken = _is_broken(error)
        try:
            if broken or isinstance(error, process.Stopped):
                self._blame_peer(SILENT + 5 if broken else 1)
            lost = self.lost or (self.store.check([LOST]) and self.store.get(LOST).decode())
            if lost and (broken or isinstance(error, (process.Stopped, Interrupted))):
                self._exit(lost, printable(str(error)).partition("\n")[0])
            interrupted = isinstance(error, KeyboardInterrupt)
            status = getattr(error, "exit_status", getattr(error, "code", 1))
            self._send(f"{LEFT}{130 if interrupted else status}")
            return self._is_first_to_print(f"{type(error).__name__}: {error}")
        except RuntimeError:  # the store is gone
            stopped = isinstance(error, (process.Stopped, Interrupted))
            if broken or (self.lost and stopped):
                saved = printable(str(error)).partition("\n")[0] if stopped else ""
                self._exit(self.lost or f"{self._holder()} is gone", saved)
            return True

    def _blame_peer(self, beats: int) -> None:
        """Exit because of a peer that has died or left; look for it during some heartbeats."""
        for beat in range(beats):
            if beat:
                self.over.wait(BEAT)  # the watching thread may find the cause
            self._read_peers()
            for rank in self.peers:
                gone = self._state(rank) == "X" or self.messages[rank].startswith(LEFT)
                if gone and self.messages[rank] != f"{LEFT}0":
                    self._exit_because_of(rank)

    def _is_first_to_print(self, text: str) -> bool:
        what = re.sub(r" for \d+ s", "", text)  # peers notice a death at different moments
        try:
            return self.store.add(f"said {machine()} {what}", 1) == 1
        except RuntimeError:  # the store is gone
            return _is_first_of_machine()

    def _exit_because_of(self, rank: int) -> None:
        """Exit this process at once: its main thread may be stuck in a collective."""
        self.ending.acquire()  # never released: another thread may come to the same conclusion
        message, state = self.messages.get(rank, ""), self._state(rank)
        identity = self.identities.get(rank, {"pid": "unknown", "host": "an unknown host"})
        status = FAILED
        how = f"has been silent for {self.silent[rank]} s"
        if message.startswith(LEFT):
            status, how = int(message.removeprefix(LEFT)), "has exited, and prints its own error"
        elif state == "X":
            how = f"is dead, silent for {self.silent[rank]} s"
        elif state in ("T", "t"):
            how = f"was stopped, silent for {self.silent[rank]} s, and is now killed"
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                psutil.Process(identity["pid"]).kill()  # it would keep the folder's lock
        who = f"rank {rank} (process {identity['pid']} on {identity['host']})"
        prints_itself = message.startswith(LEFT) and state is not None
        self._finish(status, "" if prints_itself else f"{who} {how}")

    def _exit(self, why: str, saved: str = "", answers: bool = True) -> None:
        """Exit with status 2 at once, because of a process that is no rank."""
        self.ending.acquire()
        self._finish(FAILED, f"{why}; {saved}" if saved else why, answers)

    def _finish(self, status: int, why: str, answers: bool = True) -> None:
        """Say why, unless that is empty; tell the peers, if the store answers; and exit."""
        text = _notice(self.folder, why, machine())
        if why and (self._is_first_to_print(text) if answers else _is_first_of_machine()):
            print(text, file=sys.stderr, flush=True)
        if answers:
            with contextlib.suppress(RuntimeError):
                self._send(f"{LEFT}{status}")
        os._exit(status)


def _notice(folder: Path, why: str, machine: int) -> str:
    """What a process says that ends because of another one."""
    found = checkpoints(folder)
    newest = f"the newest checkpoint is {found[0]}" if found else "there is no checkpoint yet"
    if not found and machine:  # which may not see the folder
        newest = "machine 0 keeps the checkpoints"
    how = "resumes from it" if found or machine else "starts over"
    return f"hfsft: {why}; {newest}\n  The same command {how}"


def _is_broken(error: BaseException) -> bool:
    """Whether an error, or one that it followed, is a connection to a peer that broke."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        text = str(error).lower()
        if isinstance(error, DistError) or "gloo" in text or "nccl" in text:
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _has_agent_store() -> bool:
    """Whether torchrun's agent holds the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _has_launcher() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _is_first_of_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


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


# --- before there is a process group ---


@contextlib.contextmanager
def watch_launchers(folder: Path) -> Iterator[None]:
    """Exit if a launcher dies while this rank joins the process group, which waits for its store.

    Args:
        folder: holds the stage's checkpoints.
    """
    if not (_has_agent_store() and _has_launcher()):  # rank 0, which holds the store, may be late
        yield
        return
    over = threading.Event()

    def watch() -> None:
        refused = 0
        while not over.wait(JOIN_POLL):
            refused = refused + 1 if _refuses() else 0
            if os.getppid() != process.PARENT:
                _exit_unjoined(folder, f"rank {os.environ['RANK']} (on {platform.node()})")
            if refused > 1:
                _exit_unjoined(folder, "machine 0")

    thread = threading.Thread(target=watch, name="hfsft-launchers", daemon=True)
    thread.start()
    try:
        yield
    except DistError:
        if _refuses():
            _exit_unjoined(folder, "machine 0")
        raise
    finally:
        over.set()
        thread.join()


def _refuses() -> bool:
    """Whether nobody listens where the store of machine 0's launcher is."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address, JOIN_POLL).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # a network that is slow, or gone
        return False
    return False


def _exit_unjoined(folder: Path, whose: str) -> None:
    if _is_first_of_machine():
        why = f"the launcher of {whose} is gone"
        print(_notice(folder, why, int(os.environ["GROUP_RANK"])), file=sys.stderr, flush=True)
    os._exit(FAILED)


def watch_ranks(folder: Path) -> None:
    """Watch the other ranks from now on, if there are any.

    Args:
        folder: holds the stage's checkpoints.
    """
    state = PartialState()
    if state.num_processes > 1:
        store = distributed_c10d._get_default_store().clone()
        Watchdog(folder, store, state.process_index, state.num_processes).start()
