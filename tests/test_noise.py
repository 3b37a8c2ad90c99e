"""Intervals and tests of differences, against published values and by exact enumeration."""

import math
from bisect import bisect_left, bisect_right

import numpy as np
import pytest

from hfsft.noise import mcnemar, paired_interval, wilson


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(right, rows, low, high):
    assert wilson(right, rows) == pytest.approx((low, high), abs=6e-5)
    assert wilson(rows - right, rows) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_mcnemar():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(900, 1100) == pytest.approx(8.6e-6, rel=0.02)


def test_an_interval_of_a_paired_difference():
    # at a bound the score test is at 5%, its discordant shares the likeliest ones for this bound
    for bound in paired_interval(12, 2, 50):
        lost = np.linspace(max(0, -bound), (1 - bound) / 2, 2_000_001)[1:-1]
        likelihood = 12 * np.log(lost + bound) + 2 * np.log(lost)
        likelihood += 36 * np.log(1 - 2 * lost - bound)
        best = lost[likelihood.argmax()]
        variance = 50 * (2 * best + bound - bound**2)
        assert abs(10 - 50 * bound) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-4)
    for won, lost, rows in ((12, 2, 50), (6, 0, 100), (0, 0, 7), (0, 20, 20)):
        low, high = paired_interval(won, lost, rows)
        assert paired_interval(lost, won, rows) == pytest.approx((-high, -low), abs=1e-9)
    # five wins are not significant, so 0 is included
    assert paired_interval(5, 0, 100) == (0.0, pytest.approx(0.1118, abs=1e-4))
    z = 1.959964**2
    assert paired_interval(0, 0, 50)[1] == pytest.approx(z / (50 + z))


@pytest.mark.parametrize("rows", [20, 60, 150])
def test_the_interval_agrees_with_mcnemars_test(rows):
    for lost in range(rows // 2):
        for won in range(rows - lost + 1):
            low, high = paired_interval(won, lost, rows)
            assert (low <= 0 <= high) == (mcnemar(won, lost) >= 0.05), (won, lost)


def log_binomial(rows: int, share: float) -> np.ndarray:
    """The log-probabilities of 0 to `rows` successes."""
    if share == 0:
        return np.array([0.0] + [-math.inf] * rows)
    factorials = np.array([math.lgamma(k + 1) for k in range(rows + 1)])
    k = np.arange(rows + 1)
    ways = factorials[-1] - factorials - factorials[::-1]
    return ways + k * math.log(share) + (rows - k) * math.log1p(-share)


def coverage(rows: int, difference: float, lost_share: float) -> float:
    """The exact probability that the interval holds the difference, over all possible outcomes.

    For a number of lost rows both bounds rise with the number of won ones, so the outcomes whose
    interval holds the difference are consecutive.
    """
    total = 0.0
    for lost, chance in enumerate(np.exp(log_binomial(rows, lost_share))):
        if chance < 1e-7:
            continue
        wons = range(rows - lost + 1)
        first = bisect_left(wons, difference, key=lambda n: paired_interval(n, lost, rows)[1])
        last = bisect_right(wons, difference, key=lambda n: paired_interval(n, lost, rows)[0])
        won = np.exp(log_binomial(rows - lost, (difference + lost_share) / (1 - lost_share)))
        total += chance * won[first:last].sum()
    return total


def test_how_often_the_interval_of_a_paired_difference_holds():
    found = {
        (rows, difference, lost): coverage(rows, difference, lost)
        for rows in (20, 35, 50, 100, 250, 1000)
        for difference in (0.0, 0.02, 0.1, 0.3)
        for lost in (0.0, 0.02, 0.1)
        if difference + lost > 0
    }
    assert min(found.values()) > 0.92
    for rows in (20, 35, 50, 100, 250, 1000):
        assert np.mean([value for key, value in found.items() if key[0] == rows]) > 0.94
