"""Accuracy, calibration and doubtful labels from score differences: statistics of arrays, no model.

A gap is the score of the answer that the label prefers minus that of the other, so that it is
positive where the model agrees with the label. The pairs of one prompt share a weight of 1, and
count as one draw in intervals, since they are not independent. Shape: P pairs.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chatllama.reporting.statistics import wilson_interval

Array = np.ndarray
MAX_SCALE = 1000.0
FLIPS_SAMPLE = 5000
"""About as many pairs as the fit of wrong labels looks at."""


@dataclass(frozen=True)
class Proportion:
    """A proportion of prompts with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """The pairs with a confidence in one interval."""

    share: float
    """Of all pairs, by weight."""
    confidence: float
    """Mean sigmoid(|gap|): the accuracy that the scores claim."""
    accuracy: float
    """The accuracy that they have."""
    low: float
    high: float
    """95 % interval of the accuracy."""


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def agreement(gaps: Array) -> Array:
    """1 where the model agrees with the label, 0.5 for equal scores, else 0: (P,) float64."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def weighted_mean(values: Array, weights: Array) -> float:
    """Mean of `values`; NaN without any weight."""
    total = weights.sum()
    return float((values * weights).sum() / total) if total else float("nan")


def proportion(values: Array, weights: Array) -> Proportion:
    """Weighted mean with the Wilson interval of as many draws as the weights sum to.

    Args:
        values: (P,) in [0, 1].
        weights: (P,) that sum to the number of prompts; to 0: the interval is [0, 1].
    """
    if not weights.sum():
        return Proportion(0.5, 0.0, 1.0)
    mean, count = weighted_mean(values, weights), max(1, round(float(weights.sum())))
    return Proportion(mean, *wilson_interval(mean * count, count))


def reliability(gaps: Array, weights: Array, num_bins: int = 10) -> list[Bin]:
    """Confidence against accuracy in equal intervals of [0.5, 1]; empty bins are left out."""
    confidence, correct = sigmoid(np.abs(gaps)), agreement(gaps)
    places = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = weights * (places == number)
        if inside.sum():
            right = proportion(correct, inside)
            part = float(inside.sum() / weights.sum())
            mean = weighted_mean(confidence, inside)
            bins.append(Bin(part, mean, right.value, right.low, right.high))
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """ECE: mean distance of confidence and accuracy over the bins, by their shares."""
    return sum(bin.share * abs(bin.confidence - bin.accuracy) for bin in bins)


def log_loss(gaps: Array, weights: Array) -> float:
    """Mean -log sigmoid(gap), in nats."""
    return weighted_mean(np.logaddexp(0.0, -gaps), weights)


def best_scale(gaps: Array, weights: Array, flips: float | Array = 0.0) -> float:
    """The s >= 0 under which sigmoid(s * gap) fits the labels best (Guo 2017, arXiv 1706.04599).

    1 is calibrated, below 1 the scores are overconfident; `MAX_SCALE` where no finite one is best.

    Args:
        gaps: (P,) float.
        weights: (P,) float.
        flips: probability that a label is wrong, scalar or (P,).
    """
    low, high = 0.0, MAX_SCALE
    for _ in range(40):  # the likelihood is concave in s: its slope falls
        middle = (low + high) / 2
        slope = (weights * gaps * (sigmoid(-middle * gaps) - flips)).sum()
        low, high = (middle, high) if slope >= 0 else (low, middle)
    return low


def calibration(gaps: Array, weights: Array) -> dict[str, Any]:
    """ECE, what of it is chance, the scale that would fit best, and the bins; weights sum to N."""
    bins = reliability(gaps, weights)
    return {
        "error": calibration_error(bins),
        "chance_error": _chance_error(bins, float(weights.sum())),
        "best_scale": best_scale(gaps, weights),
        "bins": [asdict(each) for each in bins],
    }


def _chance_error(bins: list[Bin], count: float) -> float:
    """The calibration error that a perfectly calibrated model shows by chance."""
    spread = [2 / math.pi * b.confidence * (1 - b.confidence) / (b.share * count) for b in bins]
    return sum(b.share * math.sqrt(s) for b, s in zip(bins, spread, strict=True))


@dataclass(frozen=True)
class Flips:
    """Labels that look wrong, by the model P(label) = e + (1 - 2e) sigmoid(s * gap)."""

    share: float
    """e that fits best: the accuracy among the surest pairs levels off at 1 - e."""
    scale: float
    """s that fits best."""
    evidence: float
    """Twice the gain in log-likelihood over e = 0; see `FLIP_EVIDENCE`."""
    suspicion: Array
    """(P,) probability that this label is wrong."""


def fit_flips(gaps: Array, weights: Array) -> Flips:
    """Separates wrong labels from an unsure model by maximum likelihood.

    A label that contradicts a sure model may also be the model's mistake: a list to look at, no
    proof. The model must not have been trained on the pairs.
    """
    part = slice(None, None, 1 + len(gaps) // FLIPS_SAMPLE)
    some, weight = gaps[part], weights[part]
    scale = best_scale(some, weight)
    start = -float((weight * np.logaddexp(0.0, -scale * some)).sum())
    best = (start, 0.0, scale)

    def improve(shares: Iterable[float]) -> None:
        nonlocal best
        for share in shares:
            scale = best[2]
            for _ in range(5):  # EM: the probability that each label is wrong, then the scale
                scale = best_scale(some, weight, _suspicion(some, share, scale))
            fit = weight * np.log(share + (1 - 2 * share) * sigmoid(scale * some))
            best = max(best, (float(fit.sum()), share, scale))

    improve(np.arange(0.02, 0.46, 0.02).tolist())
    if best[1]:
        improve([best[1] - 0.01, best[1] + 0.01])
    likelihood, share, scale = best
    return Flips(share, scale, 2 * (likelihood - start), _suspicion(gaps, share, scale))


def _suspicion(gaps: Array, share: float, scale: float) -> Array:
    """(P,) posterior probability that the label is wrong."""
    wrong = share * sigmoid(-scale * gaps)
    return wrong / (wrong + (1 - share) * sigmoid(scale * gaps))


def correlation(x: Array, y: Array) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def histogram(values: Array, weights: Array, num_bins: int = 24) -> tuple[list[float], list[float]]:
    """Edges (num_bins + 1), from -x to x, and shares; values beyond are in the outermost bins.

    `num_bins` is even, so that 0 is an edge.
    """
    spread = float(np.quantile(np.abs(values), 0.995)) or 1.0
    edges = np.linspace(-spread, spread, num_bins + 1)
    counts, _ = np.histogram(np.clip(values, -spread, spread), edges, weights=weights)
    return edges.tolist(), (counts / weights.sum()).tolist()
