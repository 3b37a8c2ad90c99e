"""Standard errors, confidence intervals, and tests of differences."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964  # standard errors on either side of a two-sided 95% interval


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927, Probable Inference, JASA 22).

    Args:
        correct: rows counted.
        rows: rows in total, at least 1.
    """
    share, spread = correct / rows, Z95 * Z95 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return middle - half if correct else 0.0, middle + half if correct < rows else 1.0


def ratio_error(sums: Sequence[float] | np.ndarray, sizes: Sequence[float] | np.ndarray) -> float:
    """Standard error of `sum(sums) / sum(sizes)` over documents.

    The ratio estimator of Cochran (1977), Sampling Techniques, section 2.11.

    Args:
        sums: [documents], such as each document's summed loss in nats.
        sizes: [documents], such as each document's predicted tokens.

    Returns:
        The error, in units of the ratio; infinite for fewer than two documents.
    """
    count = len(sums)
    if count < 2:
        return math.inf
    sums, sizes = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    residuals = sums - sums.sum() / sizes.sum() * sizes
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / sizes.sum())


def mean_change(
    before: Sequence[float], after: Sequence[float], sizes: Sequence[float]
) -> tuple[float, float]:
    """How far a mean loss per token moved between two measurements on the same documents.

    Args:
        before: [documents], each document's summed loss.
        after: the same, later.
        sizes: [documents], the tokens of each.

    Returns:
        The change, and its standard error over documents; these are paired, so that what makes a
        document hard or easy cancels out.
    """
    moved = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return float(moved.sum() / np.sum(sizes)), ratio_error(moved, sizes)


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947, Psychometrika 12).

    Args:
        won: rows that only the second model answered correctly.
        lost: rows that only the first one did.
    """
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def paired_interval(won: int, lost: int, rows: int) -> tuple[float, float]:
    """The 95% interval of a difference between two accuracies on the same rows.

    The score interval of Tango (1998, Statistics in Medicine 17), whose test at 0 is McNemar's
    without its exact tail. Where the exact test finds no difference, the interval is widened to
    include 0, so the two never contradict each other.

    Args:
        won: rows that only the second model answered correctly.
        lost: rows that only the first one did.
        rows: rows that both answered, at least 1.

    Returns:
        Bounds of the second accuracy minus the first.
    """
    value = (won - lost) / rows
    low = _score_bound(won, lost, rows, -1.0)
    high = _score_bound(won, lost, rows, 1.0)
    if mcnemar(won, lost) >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return min(low, value), max(high, value)


def _score_bound(won: int, lost: int, rows: int, end: float) -> float:
    """The difference farthest towards `end`, -1 or 1, that Tango's score test does not reject."""
    inside, outside = (won - lost) / rows, end
    for _ in range(40):  # halves the uncertainty each time
        middle = (inside + outside) / 2
        # the discordant share that is most likely given the difference
        b = (2 * rows - won + lost) * middle - won - lost
        root = math.sqrt(max(b * b + 8 * rows * lost * middle * (1 - middle), 0.0))
        variance = (root - b) / (2 * rows) + middle * (1 - middle)
        if (won - lost - rows * middle) ** 2 > Z95 * Z95 * rows * variance:
            outside = middle
        else:
            inside = middle
    return inside
