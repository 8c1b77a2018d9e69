"""Scores of a reward model against the lengths of answers: statistics of arrays, no model."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from trainers.reward.diagnosis.calibration import (
    Proportion,
    agreement,
    correlation,
    proportion,
    weighted_mean,
)

MATCHED = 0.1
"""Lengths are taken as equal up to this difference."""
LENGTH_BINS = ((-1.0, -0.5), (-0.5, -MATCHED), (-MATCHED, MATCHED), (MATCHED, 0.5), (0.5, 1.0))
"""Length of the better answer less that of the worse, over the longer's."""


def about_length(
    lengths: np.ndarray,
    scores: np.ndarray,
    better: np.ndarray,
    worse: np.ndarray,
    weights: np.ndarray,
) -> dict[str, Any]:
    """Whether scores follow length, and accuracy where length cannot help.

    Args:
        lengths: (N,) of all answers, in any unit.
        scores: (N,) float.
        better: (P,) int, numbers of the preferred answers.
        worse: (P,) int, numbers of the others.
        weights: (P,) float.
    """
    gaps = scores[better] - scores[worse]

    def accuracy(where: np.ndarray) -> Proportion:
        return proportion(agreement(gaps), weights * where)

    difference = (lengths[better] - lengths[worse]) / np.maximum(lengths[better], lengths[worse])
    longer, shorter = accuracy(difference > 0), accuracy(difference < 0)
    matched = abs(difference) <= MATCHED
    by_difference = []
    for low, high in LENGTH_BINS:
        here = (difference >= low) & (difference < high)
        if low > 0:
            here = (difference > low) & (difference <= high)
        elif high > 0:
            here = matched
        part = {"share": weighted_mean(here, weights), "accuracy": asdict(accuracy(here))}
        by_difference.append({"from": low, "to": high, **part})
    return {
        "score_correlation": correlation(lengths.astype(float), scores),
        "gap_correlation": correlation(difference, gaps),
        "longer_preferred": asdict(proportion(agreement(difference), weights)),
        "better_is_longer": asdict(longer),
        "better_is_shorter": asdict(shorter),
        "controlled_accuracy": asdict(_mean_proportion(longer, shorter)),
        "matched_accuracy": asdict(accuracy(matched)),
        "by_difference": by_difference,
    }


def _mean_proportion(a: Proportion, b: Proportion) -> Proportion:
    """Mean of two independent proportions; half-widths add in squares (Newcombe 1998)."""
    mean = (a.value + b.value) / 2
    low = math.hypot(a.value - a.low, b.value - b.low) / 2
    high = math.hypot(a.high - a.value, b.high - b.value) / 2
    return Proportion(mean, mean - low, mean + high)
