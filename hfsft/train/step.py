"""The step."""

import itertools
from collections.abc import Iterator

import torch

from hfsft.data.order import run_order


class StepSampler(torch.utils.data.Sampler):
    """The order of examples over the whole run: one seeded permutation after another.

    Every step then has its full number of examples, also where an epoch ends within it, and neither
    the device batch, nor the number of processes, nor a larger `max_steps` changes the order.
    """

    def __init__(self, examples: int, total: int, seed: int):
        self.examples, self.total, self.seed = examples, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(run_order(list(range(self.examples)), self.seed), self.total)


class StepAbandoned(Exception):
    """A step that was given up between two micro-batches: all is as it was before it."""


def get_cuda_rng_state() -> torch.Tensor | None:
    """The state of CUDA's random numbers, or None without CUDA."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None
