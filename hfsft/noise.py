"""Intervals, and tests of differences."""

import math

Z = 1.959964  # of a 95% interval


# --- figures ---


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927, Probable Inference, JASA 22)."""
    share, spread = right / rows, Z * Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return middle - half if right else 0.0, middle + half if right < rows else 1.0


def ratio_error(deviations: list[float], tokens: int) -> float | None:
    """Standard error of a ratio of two sums, from each document's deviation."""
    count = len(deviations)
    if count < 2:
        return None
    return math.sqrt(sum(d * d for d in deviations) * count / (count - 1)) / tokens


def mcnemar(won: int, lost: int) -> float:
    """How likely so uneven a split of the rows that changed is, if each way were as likely."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))
