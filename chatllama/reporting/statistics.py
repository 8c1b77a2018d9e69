"""Errors and intervals of reported numbers: plain floats, no tensors."""

import math
from collections.abc import Sequence

INTERVAL = "{:.3f} ({:.3f}\N{EN DASH}{:.3f})"
"""A value and its interval."""
NORMAL = 1.96
"""Standard errors on either side of a 95 % interval."""
FLIP_EVIDENCE = 2.71
"""Likelihood ratio above which wrong labels are more than chance (5 %, one-sided)."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (unbiased deviation / sqrt(n)); the error of one value is inf."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def wilson_interval(successes: float, count: int, z: float = NORMAL) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), sensible near 0 and 1 too.

    Of `count` draws, at least 1, `successes` succeeded; ties may count one half. `z` is the
    standard normal quantile.
    """
    share = successes / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def interval_text(value: float, low: float, high: float) -> str:
    """A proportion with its interval, for the report."""
    return INTERVAL.format(value, low, high)
