"""Which examples a run sees, and in which order: epochs, copies, what is held out."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from hfsft.errors import DataError
from hfsft.recipe.schema import Source, Stage


@dataclass(frozen=True)
class Origins:
    """Which row of which source each conversation of a training set was."""

    sources: list[str]
    # of every conversation that was encoded
    source_of: list[int]
    row_of: list[int]
    places: list[int]  # of them, those of the training set

    def __getitem__(self, conversation: int) -> dict[str, Any]:
        place = self.places[conversation]
        return {"source": self.sources[self.source_of[place]], "row": self.row_of[place]}


def run_order(items: list[Any], seed: int) -> Iterator[Any]:
    """The order of examples, without end: one seeded permutation after another.

    Every step then has its full number of examples, also where an epoch ends within it, and neither
    the device batch, nor the number of processes, nor a larger `max_steps` changes the order.

    Args:
        items: an epoch's.
        seed: the run's.
    """
    for epoch in itertools.count() if items else ():
        order = list(range(len(items)))
        random.Random(f"{seed}:epoch:{epoch}").shuffle(order)
        yield from (items[i] for i in order)


class RunOrder(datasets.Dataset):
    """The examples of a whole run: item i is the i-th that is trained on.

    Its columns are `input_ids` and `labels`. It is a `datasets.Dataset` as trl takes no other.
    """

    origins: Origins  # of its examples

    def __init__(self, conversations: datasets.Dataset, places: list[int], epoch: int):
        """Lay out the run.

        Args:
            conversations: with `input_ids`, `labels` and `length`.
            places: the conversation of each example.
            epoch: examples of an epoch.
        """
        run = conversations.select_columns(["input_ids", "labels"]).select(places)
        super().__init__(run.data, run.info, run.split, run._indices, run._fingerprint)
        self.conversations, self.places, self.epoch = conversations, places, epoch
        lengths = conversations["length"][:]
        self.lengths = [lengths[place] for place in places]  # tokens of each example


def copies(items: list[Any], source: Source, seed: int) -> list[Any]:
    """The items of one epoch: each as often as the source says, a seeded part once more."""
    whole = int(source.copies)
    part = round(len(items) * (source.copies - whole))
    more = random.Random(f"{seed}:weight:{source}").sample(range(len(items)), part)
    return items * whole + [items[i] for i in sorted(more)]


def choose_held_out(stage: Stage, different: Sequence[Any]) -> set[Any]:
    """What a stage holds out, chosen by its seed.

    Args:
        stage: says how many, or which share.
        different: digests of all content, or their places: sorted, none twice.

    Raises:
        DataError: if that leaves nothing to train on.
    """
    if not stage.validates:
        return set()
    count = stage.held_out if stage.held_out >= 1 else max(1, int(stage.held_out * len(different)))
    if count >= len(different):
        kind = "documents" if stage.name == "base" else "conversations"
        raise DataError(
            f"{stage.name}: held_out: {count} of {len(different)} different {kind} leaves none to "
            "train on"
        )
    return set(random.Random(f"{stage.seed}:held_out").sample(different, int(count)))


def packing_order(conversations: int, seed: int) -> list[int]:
    """The order in which mid lays so many conversations into rows."""
    order = list(range(conversations))
    random.Random(f"{seed}:packing").shuffle(order)
    return order
