"""A step's examples dealt to ranks."""

import itertools
import random

import pytest

from hfsft.data.order import deal, idle_share
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
    assert idle_share([[3, 3, 1, 1]], 2, dealt=False) == pytest.approx(1 - 8 / 12)
    assert idle_share([[3, 3, 1, 1]], 2) == 0.0


def test_lengths_as_of_chats_leave_eight_ranks_idle_for_less_than_a_twentieth():
    rng = random.Random(3)
    steps = [[min(512, 60 + int(rng.expovariate(1 / 110))) for _ in range(32)] for _ in range(40)]
    assert idle_share(steps, 8) < 0.05 < 0.2 < idle_share(steps, 8, dealt=False)


def test_a_step_keeps_its_examples_and_one_rank_its_order():
    lengths = [5, 90, 7, 80, 60, 10, 50, 20, 1, 2]
    assert list(DealtSampler(lengths, 4, 1)) == list(range(10))
    dealt = list(DealtSampler(lengths, 4, 2))
    assert sorted(dealt[:4]) == [0, 1, 2, 3] and sorted(dealt[4:8]) == [4, 5, 6, 7]
    assert dealt[8:] == [8, 9]
    assert sum(lengths[i] for i in dealt[:2]) in (95, 87)
