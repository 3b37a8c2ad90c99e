"""A step's examples dealt to ranks."""

import itertools
import random

import pytest

from hfsft.data.order import deal, fewest_tokens, idle_share
from hfsft.train.step import DealtSampler


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_every_rank_gets_as_many_examples_and_none_is_lost(ranks):
    lengths = [random.Random(7).randint(20, 1024) for _ in range(32)]
    hands = deal(lengths, ranks)
    assert [len(hand) for hand in hands] == [32 // ranks] * ranks
    assert sorted(itertools.chain(*hands)) == list(range(32))


def test_swaps_find_what_longest_first_misses():
    # longest first gives 3+3 and 2+2 of equal counts; dealt evenly both have 5
    assert idle_share([[3, 3, 2, 2]], 2) == 0.0
    # no deal of two each does better than 9+1 beside 2+2
    assert [sum([9, 2, 2, 1][i] for i in hand) for hand in deal([9, 2, 2, 1], 2)] == [10, 4]


def test_the_idle_share_is_what_the_others_wait():
    # in blocks the second rank has 2 tokens of the first one's 6
    assert idle_share([[3, 3, 1, 1]], 2, "blocks") == pytest.approx(1 - 8 / 12)
    assert idle_share([[3, 3, 1, 1]], 2) == 0.0


@pytest.mark.parametrize(
    ("lengths", "ranks"),
    [
        ([6, 5, 4, 3], 2),  # the mean
        ([9, 2, 2, 1], 2),  # the longest, beside the shortest
        ([9, 9, 9, 1, 1, 1], 2),  # two of three long ones
        ([7, 7, 7, 7, 2, 2], 3),
    ],
)
def test_the_bound_of_a_small_step_is_what_the_best_dealing_reaches(lengths, ranks):
    size = len(lengths) // ranks
    best = min(
        max(sum(order[i * size : (i + 1) * size]) for i in range(ranks))
        for order in set(itertools.permutations(lengths))
    )
    assert fewest_tokens(lengths, ranks) == best


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_no_dealing_is_below_the_bound_and_ours_is_close_to_it(ranks):
    rng = random.Random(5)
    heavy = [[min(2048, int(rng.lognormvariate(5, 1.2))) for _ in range(32)] for _ in range(40)]
    for lengths in heavy:
        tokens = max(sum(lengths[i] for i in hand) for hand in deal(lengths, ranks))
        assert tokens >= fewest_tokens(lengths, ranks)
    bound, dealt = (idle_share(heavy, ranks, how) for how in ("bound", "dealt"))
    assert bound <= dealt < bound + 0.01


def test_lengths_as_of_chats_leave_eight_ranks_idle_for_less_than_a_twentieth():
    rng = random.Random(3)
    steps = [[min(512, 60 + int(rng.expovariate(1 / 110))) for _ in range(32)] for _ in range(40)]
    assert idle_share(steps, 8) < 0.05 < 0.2 < idle_share(steps, 8, "blocks")


def test_a_step_keeps_its_examples_and_one_rank_its_order():
    lengths = [5, 90, 7, 80, 60, 10, 50, 20, 1, 2]
    assert list(DealtSampler(lengths, 4, 1)) == list(range(10))
    dealt = list(DealtSampler(lengths, 4, 2))
    assert sorted(dealt[:4]) == [0, 1, 2, 3] and sorted(dealt[4:8]) == [4, 5, 6, 7]
    assert dealt[8:] == [8, 9]
    assert sum(lengths[i] for i in dealt[:2]) in (95, 87)
