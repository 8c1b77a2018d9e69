"""Win rates with intervals: statistics of arrays, no model.

An outcome is 1 where the second of two answers is better, 0 where the first is, 0.5 for a tie; in
between where two orders of showing them disagree. All comparisons of one prompt form a cluster,
which is drawn as a whole. Shapes: P comparisons, C clusters, R resamples.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from chatllama.reporting.statistics import wilson_interval
from trainers.reward.diagnosis.calibration import Array, Proportion, sigmoid

RESAMPLES = 1000
RIDGE = 0.01
"""Weight of the squared coefficients in the fit; keeps them finite where one side always wins."""
NEWTON_STEPS, CONVERGED = 25, 1e-6


def numbered(names: Sequence[object]) -> Array:
    """0, 1, ... in the place of each distinct name, by first appearance: (P,) int."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], dtype=int)


def clustered(weights: Array, clusters: Array) -> Array:
    """The weights, scaled to sum to the number of independent clusters that they are worth.

    That is (sum W)^2 / sum W^2 over the clusters' weights W (Kish 1965): the number of clusters
    where all weigh the same. Intervals of such weights take a cluster for one draw.
    """
    total = np.bincount(clusters, weights)
    return weights * (total.sum() / np.square(total).sum())


def resampled(clusters: Array, seed: int = 0) -> Array:
    """How often each comparison is drawn: (R, P) float; clusters are drawn with replacement."""
    count = int(clusters.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws[:, clusters].astype(float)


def win_rate(outcomes: Array, clusters: Array, draws: Array) -> Proportion:
    """Mean outcome with the 95 % interval of a bootstrap over clusters.

    Where every resample has the same mean, such as 20 wins of 20, it is Wilson's with a draw for
    each cluster.
    """
    mean = float(outcomes.mean())
    low, high = np.quantile(draws @ outcomes / draws.sum(1), (0.025, 0.975))
    if low == high:
        count = int(clusters.max()) + 1
        return Proportion(mean, *wilson_interval(mean * count, count))
    return Proportion(mean, float(low), float(high))


def length_controlled(
    outcomes: Array, differences: Array, clusters: Array, draws: Array
) -> dict[str, Any]:
    """The win rate at equal lengths, and what length does: `coefficient`, in log-odds.

    P(second wins) = sigmoid(a + b tanh(d / deviation of d)), d the length of the second answer less
    that of the first; at equal lengths that is sigmoid(a). AlpacaEval 2's model (Dubois 2024, arXiv
    2404.04475, section 3) without its difficulty of instructions, which takes a leaderboard of
    models to estimate. Intervals by the same bootstrap, refitted.

    Args:
        outcomes: (P,) in [0, 1].
        differences: (P,) float, of lengths.
        clusters: (P,) int.
        draws: (R, P) float, from `resampled`.
    """
    spread = float(differences.std())
    x = np.tanh(differences / spread) if spread else np.zeros(len(differences))
    level, slope = fit_logistic(x, outcomes, np.ones((1, len(x))))
    levels, slopes = fit_logistic(x, outcomes, draws)
    low, high = (float(end) for end in np.quantile(sigmoid(levels), (0.025, 0.975)))
    if np.ptp(outcomes) == 0:  # every resample is the same
        alike = win_rate(outcomes, clusters, draws)
        low, high = alike.low, alike.high
    ends = [float(end) for end in np.quantile(slopes, (0.025, 0.975))]
    return {
        "win_rate": {"value": float(sigmoid(level)[0]), "low": low, "high": high},
        "coefficient": {"value": float(slope[0]), "low": ends[0], "high": ends[1]},
    }


def fit_logistic(x: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """Intercepts and slopes (R,) of logistic regressions on one feature, by Newton's method.

    Args:
        x: (P,) float.
        targets: (P,) in [0, 1].
        weights: (R, P) float, one row for each regression.
    """
    level, slope = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(NEWTON_STEPS):
        p = sigmoid(level[:, None] + slope[:, None] * x)
        error, curve = weights * (targets - p), weights * p * (1 - p)
        down, along = error.sum(1) - RIDGE * level, error @ x - RIDGE * slope
        a, b, c = curve.sum(1) + RIDGE, curve @ x, curve @ (x * x) + RIDGE
        scale = a * c - b * b
        # Damped: far from the optimum the curve is nearly flat.
        steps = np.clip([(c * down - b * along) / scale, (a * along - b * down) / scale], -2, 2)
        level, slope = level + steps[0], slope + steps[1]
        if np.abs(steps).max() < CONVERGED:
            break
    return level, slope


def longer_preferred(outcomes: Array, differences: Array, clusters: Array) -> dict[str, Any] | None:
    """Share of the longer answers that win, ties one half; None where all lengths are equal."""
    unequal = differences != 0
    if not unequal.any():
        return None
    wins = np.where(differences > 0, outcomes, 1 - outcomes)[unequal]
    own = numbered(clusters[unequal].tolist())
    return asdict(win_rate(wins, own, resampled(own)))


def position_bias(orders: Array, clusters: Array) -> dict[str, Any]:
    """How far a judge follows the order in which it sees the answers.

    Args:
        orders: (P, 2) in {0, 0.5, 1}: the outcome with the first answer shown first, then with the
            second shown first.
        clusters: (P,) int.

    Returns:
        `first_shown`: share of the decided verdicts that prefer what is shown first, 0.5 without
        bias; None where all are ties. `consistent`: share of comparisons with the same outcome in
        both orders.
    """
    shown_first = np.stack([1 - orders[:, 0], orders[:, 1]], axis=1)
    decided = shown_first != 0.5
    same = (orders[:, 0] == orders[:, 1]).astype(float)
    found: dict[str, Any] = {"first_shown": None, "decided": int(decided.sum())}
    if decided.any():
        own = numbered(np.stack([clusters, clusters], axis=1)[decided].tolist())
        found["first_shown"] = asdict(win_rate(shown_first[decided], own, resampled(own)))
    found["consistent"] = asdict(win_rate(same, clusters, resampled(clusters)))
    return found


def summarise(
    outcomes: Array, differences: Array, prompts: Sequence[object], orders: Array | None = None
) -> dict[str, Any]:
    """Everything of one set of comparisons, as JSON values.

    Args:
        outcomes: (P,) in [0, 1].
        differences: (P,) float, length of the second answer less that of the first.
        prompts: P, equal for the comparisons of one prompt.
        orders: for judges that saw both orders; see `position_bias`.
    """
    clusters = numbered(prompts)
    draws = resampled(clusters)
    return {
        "comparisons": len(outcomes),
        "prompts": int(clusters.max()) + 1,
        "wins": int((outcomes > 0.5).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes < 0.5).sum()),
        "win_rate": asdict(win_rate(outcomes, clusters, draws)),
        "length_controlled": length_controlled(outcomes, differences, clusters, draws),
        "longer_preferred": longer_preferred(outcomes, differences, clusters),
        "mean_length_difference": float(differences.mean()),
        "position": None if orders is None else position_bias(orders, clusters),
    }
