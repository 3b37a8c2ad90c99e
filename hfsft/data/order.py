"""Which examples a run sees and in which order: epochs, copies of a source, the held-out set."""

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
    # of every encoded conversation
    source_of: list[int]
    row_of: list[int]
    examples: list[int]  # the encoded conversation of each example of the training set

    def __getitem__(self, example: int) -> dict[str, Any]:
        item = self.examples[example]
        return {"source": self.sources[self.source_of[item]], "row": self.row_of[item]}


def run_order(items: list[Any], seed: int) -> Iterator[Any]:
    """The infinite order of examples: one seeded permutation of the epoch after another.

    Every step gets its full number of examples, even one in which an epoch ends. The order does not
    depend on the device batch, the world size or `max_steps`.

    Args:
        items: one epoch's.
        seed: the run's.
    """
    for epoch in itertools.count() if items else ():
        order = list(range(len(items)))
        random.Random(f"{seed}:epoch:{epoch}").shuffle(order)
        yield from (items[i] for i in order)


class RunOrder(datasets.Dataset):
    """The examples of an entire run: item i is the i-th that is trained on.

    Its columns are `input_ids` and `labels`. It is a `datasets.Dataset` because trl's trainer
    requires one.
    """

    origins: Origins  # of its examples

    def __init__(self, conversations: datasets.Dataset, indices: list[int], epoch: int):
        """Select the run's examples.

        Args:
            conversations: with `input_ids`, `labels` and `length`.
            indices: the conversation of each example.
            epoch: the number of examples in an epoch.
        """
        run = conversations.select_columns(["input_ids", "labels"]).select(indices)
        super().__init__(run.data, run.info, run.split, run._indices, run._fingerprint)
        self.conversations, self.indices, self.epoch = conversations, indices, epoch
        lengths = conversations["length"][:]
        self.lengths = [lengths[index] for index in indices]  # tokens of each example


def copies(items: list[Any], source: Source, seed: int) -> list[Any]:
    """The items of one epoch: all of them `copies` times, the fraction being a seeded sample.

    Args:
        items: the source's.
        source: says how many copies, such as 2.5.
        seed: the run's.
    """
    full = int(source.copies)
    rest = round(len(items) * (source.copies - full))
    sample = random.Random(f"{seed}:weight:{source.seed_name}").sample(range(len(items)), rest)
    return items * full + [items[i] for i in sorted(sample)]


def choose_held_out(stage: Stage, distinct: Sequence[Any]) -> set[Any]:
    """Choose what a stage holds out, by its seed.

    Args:
        stage: says how many, or which share.
        distinct: digests of all content, or their indices: sorted, without repeats.

    Raises:
        DataError: if that leaves nothing to train on.
    """
    if not stage.validates:
        return set()
    count = stage.held_out if stage.held_out >= 1 else max(1, int(stage.held_out * len(distinct)))
    if count >= len(distinct):
        kind = "documents" if stage.name == "base" else "conversations"
        raise DataError(
            f"{stage.name}: held_out: {count} of {len(distinct)} distinct {kind} leaves none to "
            "train on"
        )
    return set(random.Random(f"{stage.seed}:held_out").sample(distinct, int(count)))


def packing_order(conversations: int, seed: int) -> list[int]:
    """The seeded order in which mid packs its conversations into rows."""
    order = list(range(conversations))
    random.Random(f"{seed}:packing").shuffle(order)
    return order


def deal(lengths: list[int], ranks: int) -> list[list[int]]:
    """Deal a step's examples to ranks: equally many to each, and tokens as equal as swaps get them.

    Longest first to the rank with the fewest tokens that has room (Graham 1969, with equal
    counts), then single examples are swapped between the fullest rank and the others.

    Args:
        lengths: tokens of each example; their number is divisible by `ranks`.
        ranks: the world size.

    Returns:
        The examples of each rank, in the order they came.
    """
    room = len(lengths) // ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = min((r for r in range(ranks) if len(hands[r]) < room), key=tokens.__getitem__)
        hands[emptiest].append(example)
        tokens[emptiest] += lengths[example]
    while (swap := _best_swap(hands, tokens, lengths)) is not None:
        fullest, other, given, taken = swap
        hands[fullest].remove(given)
        hands[other].remove(taken)
        hands[fullest].append(taken)
        hands[other].append(given)
        moved = lengths[given] - lengths[taken]
        tokens[fullest] -= moved
        tokens[other] += moved
    return [sorted(hand) for hand in hands]


def _best_swap(
    hands: list[list[int]], tokens: list[int], lengths: list[int]
) -> tuple[int, int, int, int] | None:
    """The swap with the fullest rank that leaves the fuller of both with the fewest tokens.

    Returns:
        The fullest rank, the other, the example it gives and the one it takes; None if no swap
        leaves both with fewer tokens than the fullest has.
    """
    fullest = max(range(len(hands)), key=tokens.__getitem__)
    best, found = tokens[fullest], None
    for other in range(len(hands)):
        for given in hands[fullest]:
            for taken in hands[other] if other != fullest else ():
                moved = lengths[given] - lengths[taken]
                most = max(tokens[fullest] - moved, tokens[other] + moved)
                if most < best:
                    best, found = most, (fullest, other, given, taken)
    return found


def fewest_tokens(lengths: list[int], ranks: int) -> int:
    """A lower bound of the fullest rank's tokens, however a step is dealt over equal counts.

    No rank can have fewer than the mean. Of the `count * ranks + 1` longest examples some rank has
    `count + 1`, at best the shortest of them, and fills up with the shortest of all.

    Args:
        lengths: tokens of each example; their number is divisible by `ranks`.
        ranks: the world size.
    """
    room, falling = len(lengths) // ranks, sorted(lengths, reverse=True)
    bound = -(-sum(lengths) // ranks)
    for count in range(room):
        crowd = falling[count * (ranks - 1) : count * ranks + 1]
        bound = max(bound, sum(crowd) + sum(falling[len(falling) - (room - count - 1) :]))
    return bound


def idle_share(steps: list[list[int]], ranks: int, how: str = "dealt") -> float:
    """The share of time that ranks wait for the one with most tokens.

    Args:
        steps: tokens of each example of each step.
        ranks: the world size.
        how: `dealt` as `deal` does, in `blocks` of consecutive examples, or `bound`: the least
            that any dealing could reach, by `fewest_tokens`.
    """
    busy = waited_for = 0
    for lengths in steps:
        size = len(lengths) // ranks
        hands = [list(range(rank * size, (rank + 1) * size)) for rank in range(ranks)]
        if how == "dealt":
            hands = deal(lengths, ranks)
        fullest = max(sum(lengths[example] for example in hand) for hand in hands)
        if how == "bound":
            fullest = fewest_tokens(lengths, ranks)
        busy, waited_for = busy + sum(lengths), waited_for + ranks * fullest
    return 1 - busy / waited_for
