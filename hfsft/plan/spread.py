"""Over how many processes a stage is planned: what each holds, and what they send each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from accelerate import PartialState

# assumed, not measured: bytes/s that a ring over PCIe 4.0 reaches between consumer cards
PCIE = 12e9
# which kinds of memory are divided over the ranks (Rajbhandari et al. 2020, ZeRO stages 2 and 3)
SHARDED = {
    "DDP": (),
    "ZeRO-2": ("gradients", "optimizer"),
    "FSDP2": ("weights", "gradients", "optimizer"),
}
# how often a step sends the trained weights or their gradients once around: an all-reduce is a
# reduce-scatter and an all-gather; FSDP2 gathers weights forwards and backwards
SENT = {"DDP": 2, "ZeRO-2": 2, "FSDP2": 3}


@dataclass(frozen=True)
class Spread:
    """Processes and what they share."""

    processes: int = 1
    kind: str = "DDP"

    def own(self, sizes: dict[str, int], gathered: int) -> dict[str, int]:
        """What one process holds of memory that is divided over all.

        Args:
            sizes: bytes of each kind of memory.
            gathered: bytes of weights that are whole on every rank at a time, under FSDP2.
        """
        shared = SHARDED[self.kind] if self.processes > 1 else ()
        own = {
            kind: -(-size // self.processes) if kind in shared else size
            for kind, size in sizes.items()
        }
        if "weights" in shared:
            own["weights"] += gathered
        return own

    def seconds_sent(self, trained: int) -> float:
        """Seconds that a step's gradients take over PCIe, if no computation hides them.

        Args:
            trained: parameters that are trained, sent as float32.
        """
        share = (self.processes - 1) / self.processes
        return SENT[self.kind] * share * 4 * trained / PCIE


_planned: ContextVar[Spread | None] = ContextVar("planned", default=None)


def spread() -> Spread:
    """What is planned for: as `planned_for` says, else as this process runs."""
    planned = _planned.get()
    if planned is not None:
        return planned
    kind = "DDP"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        kind = "FSDP2"
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        kind = "ZeRO-2"
    return Spread(PartialState().num_processes, kind)


@contextmanager
def planned_for(planned: Spread) -> Iterator[None]:
    """Plan for other processes than this one within a `with` block."""
    token = _planned.set(planned)
    try:
        yield
    finally:
        _planned.reset(token)
