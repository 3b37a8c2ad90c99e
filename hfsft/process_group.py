"""The process group: what ranks tell each other through its store, however long one of them takes.

A collective fails after the group's time-out, which preparing data can exceed by hours. Here a rank
polls the store instead, so it waits as long as the watchdog (`train/ranks.py`) finds its peers
alive. With one process every function does nothing.
"""

import itertools
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch.distributed import distributed_c10d

from hfsft.errors import HfsftError

SAID_AFTER = 10.0  # seconds of waiting, after which a line says so
BLOCK = 64 * 2**20  # bytes of a file that are sent at once

_points = itertools.count()  # every rank passes the same points in the same order


@cache
def _store() -> Any:
    """A connection of its own to the group's store: a call blocks every other one on it."""
    return distributed_c10d._get_default_store().clone()


# --- machines ---


def machine() -> int:
    """The index of this rank's machine, as the launcher counts them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))
    return int(os.environ.get("GROUP_RANK", PartialState().process_index // local))


def machines() -> int:
    """How many machines the ranks run on, as the launcher counts them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))
    return int(os.environ.get("GROUP_WORLD_SIZE", -(-PartialState().num_processes // local)))


def place() -> str:
    """This rank and its machine, for a message."""
    return f"rank {PartialState().process_index} on machine {machine()} ({platform.node()})"


def is_main() -> bool:
    """Whether this is rank 0."""
    return PartialState().is_main_process


def is_first_of_machine() -> bool:
    """Whether this is the first rank of its machine."""
    return PartialState().is_local_main_process


# --- waiting ---


def meet(doing: str, quiet: bool = False) -> None:
    """Wait until every rank is here.

    Args:
        doing: what those that are missing do, for the line that says who is waited for.
        quiet: print no such line.
    """
    gathered(None, doing, quiet)


def gathered(value: Any, doing: str = "starts", quiet: bool = False) -> list[Any]:
    """A value of each rank, in the order of the ranks; every rank calls it.

    Args:
        value: this rank's.
        doing: as in `meet`.
        quiet: as in `meet`.
    """
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    point = next(_points)
    keys = [f"point {point} {rank}" for rank in range(state.num_processes)]
    _store().set(keys[state.process_index], pickle.dumps(value))
    _wait(keys, doing, quiet)
    return [pickle.loads(_store().get(key)) for key in keys]


def from_main(make: Callable[[], Any], doing: str = "decides", quiet: bool = False) -> Any:
    """What `make` returns or raises on rank 0, on every rank.

    Args:
        make: called on rank 0 alone, which may be the only one that sees the run's folder.
        doing: as in `meet`.
        quiet: as in `meet`.

    Raises:
        HfsftError: what `make` raised. Any other error ends rank 0, and with it the rest.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    key = f"point {next(_points)} 0"
    if state.is_main_process:
        try:
            result = (make(), None)
        except HfsftError as error:
            result = (None, error)
        _store().set(key, pickle.dumps(result))
    else:
        _wait([key], doing, quiet)
        result = pickle.loads(_store().get(key))
    value, error = result
    if error is not None:
        raise error
    return value


@contextmanager
def first_of_machine_first(doing: str, quiet: bool = False) -> Iterator[None]:
    """Enter a `with` block on one rank of each machine, and then on its others.

    What the first one leaves in the machine's cache, the others find there.

    Args:
        doing: as in `meet`.
        quiet: as in `meet`.
    """
    if PartialState().num_processes == 1:
        yield
        return
    key = f"point {next(_points)} machine {machine()}"
    if not is_first_of_machine():
        _wait([key], doing, quiet, machine_of=key)
    yield
    if is_first_of_machine():
        _store().set(key, b"")


def _wait(keys: list[str], doing: str, quiet: bool, machine_of: str | None = None) -> None:
    """Wait for keys of the store, and say so after `SAID_AFTER` seconds on each machine once."""
    began, pause = time.monotonic(), 0.01
    said = quiet or PartialState().local_process_index > (machine_of is not None)
    while not _store().check(keys):
        if not said and time.monotonic() - began > SAID_AFTER:
            said = True
            missing = [key.split()[2] for key in keys if not _store().check([key])]
            whom = f"rank {', '.join(missing)}" if machine_of is None else "its machine's first one"
            print(f"{place()} waits for {whom}, which {doing}", flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


# --- folders ---


def is_shared(folder: Path) -> bool:
    """Whether every machine sees the same folder; every rank calls it.

    Args:
        folder: created on rank 0's machine if it does not exist.
    """
    if machines() == 1:
        return True
    probe = folder / f".seen-{os.getpid()}-{time.time_ns()}"

    def leave_probe() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        return probe

    left = from_main(leave_probe)
    found = all(gathered(left.exists()))
    from_main(left.unlink)
    return found


def copy_from_main(folder: Path, names: list[str], target: Path) -> None:
    """Copy files from rank 0's machine to every other one; every rank calls it.

    Args:
        folder: of the files on rank 0's machine.
        names: of the files, relative to the folder; the same on every rank.
        target: the folder to write them to on the other machines, on its first rank.
    """
    state = PartialState()
    writes = is_first_of_machine() and not state.is_main_process
    for name in names:
        size = from_main(lambda path=folder / name: path.stat().st_size)
        if writes:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        path = folder / name if state.is_main_process else target / name if writes else os.devnull
        with open(path, "rb" if state.is_main_process else "wb") as file:
            for start in range(0, size, BLOCK):
                length = min(BLOCK, size - start)
                block = torch.empty(length, dtype=torch.uint8)
                if state.is_main_process:
                    block = torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8)
                block = broadcast(block.to(state.device))
                if writes:
                    file.write(block.cpu().numpy().tobytes())
    meet("receives files")
