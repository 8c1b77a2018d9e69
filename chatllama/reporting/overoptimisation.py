"""Over-optimisation: gold and proxy reward over the KL, of PPO and of best-of-n, with fits.

The axes and functional forms are those of Gao et al. 2022 (arXiv 2210.10760): d = sqrt(KL). Answers
are sampled and judged in `inference/evaluation/overoptimisation.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from chatllama.reporting.plots import LINES, style, themed
from chatllama.reporting.statistics import NORMAL, mean_and_error
from chatllama.runs.folder import RunFolder
from chatllama.runtime.json_files import MORE_KEYS, held_to_be_whole, read_json

Numbers = np.ndarray[Any, np.dtype[np.float64]]
RESAMPLES = 1000
"""Of the prompts, for the standard errors of the fits."""
FORMS = {"best_of_n": "d (alpha - beta d)", "ppo": "d (alpha - beta log d)"}
"""Gain of gold over the start, at d = sqrt(KL) (section 3.1 there)."""
NAMES = {"best_of_n": "best of n", "ppo": "PPO"}


@dataclass(frozen=True)
class Point:
    """The answers of one policy to P prompts: means over a prompt's samples, or single samples."""

    label: int
    """n, or the step of PPO."""
    kl: Sequence[float]
    """(P,) nats to the start, whose mean is the KL."""
    gold: Sequence[float]
    """(P,)"""
    proxy: Sequence[float]
    """(P,)"""


class Curves(TypedDict):
    """RUN/overoptimisation.json."""

    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    gold: str
    prompts: int
    samples: int
    best_of_n: list[dict[str, float]]
    ppo: list[dict[str, float]]
    fits: dict[str, dict[str, float | None] | None]
    turn: dict[str, float]


def best_of_n(proxy: Numbers, gold: Numbers, n: int) -> Point:
    """Best-of-n of each prompt, its mean over all choices of n of the N samples.

    The i-th worst of N, from 0, is the best of n samples in C(i, n - 1) of C(N, n) choices (Nakano
    2021, arXiv 2112.09332, appendix I). The KL is its bound log n - (n - 1) / n.

    Args:
        proxy: (P, N), what chooses.
        gold: (P, N), of the same samples.
        n: at most N.
    """
    total = proxy.shape[1]
    share = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    order = np.argsort(proxy, axis=1, kind="stable")
    kl = math.log(n) - (n - 1) / n
    values = (np.take_along_axis(each, order, axis=1) @ share for each in (gold, proxy))
    return Point(n, [kl] * len(proxy), *(each.tolist() for each in values))


def measured_curves(
    judge: str, samples: int, best: Sequence[Point], ppo: Sequence[Point]
) -> Curves:
    """Means, errors, fits and the turn of both curves.

    Args:
        judge: in words, what `gold` is.
        samples: answers of the start to each prompt.
        best: of n = 1, which is the start, and of larger n.
        ppo: of step 0, the start, and of later steps, on the same prompts.
    """
    points = {"best_of_n": best, "ppo": ppo}
    shown = {name: [_shown(point, name) for point in each] for name, each in points.items()}
    return {
        "gold": judge,
        "prompts": len(best[0].gold),
        "samples": samples,
        "best_of_n": shown["best_of_n"],
        "ppo": shown["ppo"],
        "fits": {name: fit(each, name) for name, each in points.items()},
        "turn": _turn(ppo),
    }


def _shown(point: Point, name: str) -> dict[str, float]:
    """Means and standard errors of a point."""
    found: dict[str, float] = {"n" if name == "best_of_n" else "step": point.label}
    for key in ("kl", "gold", "proxy"):
        found[key], found[f"{key}_se"] = mean_and_error(vars(point)[key])
    return found | {"distance": math.sqrt(max(found["kl"], 0.0))}


def fit(points: Sequence[Point], name: str) -> dict[str, float | None] | None:
    """Least squares of the curve's form, with bootstrap errors over prompts.

    `peak` is the distance at which the fit is highest; None where that is not within what was
    measured.

    Returns:
        None with fewer than three points beyond the start: two numbers fit two points always.
    """
    kl, gold = (np.array([vars(point)[key] for point in points]) for key in ("kl", "gold"))
    rows = np.random.default_rng(0).integers(kl.shape[1], size=(RESAMPLES, kl.shape[1]))
    found = _solve(kl.mean(1), gold.mean(1), name)
    if found is None:
        return None
    drawn = [_solve(kl[:, each].mean(1), gold[:, each].mean(1), name) for each in rows]
    errors = np.std([each for each in drawn if each is not None], axis=0, ddof=1).tolist()
    alpha, beta = found
    peak = math.inf
    if beta > 0:
        exponent = min(alpha / beta - 1, 700.0)
        peak = math.exp(exponent) if name == "ppo" else alpha / (2 * beta)
    within = 0 < peak <= math.sqrt(max(kl.mean(1)))
    return {
        "alpha": alpha, "alpha_se": errors[0], "beta": beta, "beta_se": errors[1],
        "peak": peak if within else None,
    }  # fmt: skip


def _solve(kl: Numbers, gold: Numbers, name: str) -> tuple[float, float] | None:
    """Alpha and beta; the first point is the start, those whose KL is not above 0 have no place."""
    placed = kl > 0
    placed[0] = False
    if placed.sum() < 3:
        return None
    d = np.sqrt(kl[placed])
    second = d * (d if name == "best_of_n" else np.log(d))
    found, *_ = np.linalg.lstsq(np.stack([d, -second], 1), gold[placed] - gold[0], rcond=None)
    return float(found[0]), float(found[1])


def fitted(form: dict[str, float | None], name: str, distance: Numbers) -> Numbers:
    """Gain over the start by a fit."""
    alpha, beta = form["alpha"], form["beta"]
    assert alpha is not None and beta is not None
    bend = distance if name == "best_of_n" else np.log(np.maximum(distance, 1e-12))
    return distance * (alpha - beta * bend)


def _turn(ppo: Sequence[Point]) -> dict[str, float]:
    """How gold and proxy change from the evaluation with the best gold to the last, paired."""
    best = max(ppo, key=lambda point: sum(point.gold))
    found: dict[str, float] = {"best_step": best.label, "last_step": ppo[-1].label}
    for key in ("gold", "proxy"):
        pairs = zip(vars(ppo[-1])[key], vars(best)[key], strict=True)
        found[f"{key}_change"], found[f"{key}_change_se"] = mean_and_error(
            [last - first for last, first in pairs]
        )
    return found


def verdict_of(turn: dict[str, float]) -> str:
    """What the change after the best evaluation says, in one sentence."""
    gold, error = turn["gold_change"], turn["gold_change_se"]
    figures = (
        f"from step {turn['best_step']:g} to {turn['last_step']:g} gold changes by {gold:+.3f} "
        f"± {error:.3f} and the proxy by {turn['proxy_change']:+.3f} "
        f"± {turn['proxy_change_se']:.3f}"
    )
    if turn["best_step"] == turn["last_step"]:
        return "No over-optimisation seen: gold is highest at the last evaluation."
    if gold + NORMAL * error >= 0:
        return f"No over-optimisation that is more than chance: {figures}."
    if turn["proxy_change"] > 0:
        return f"Over-optimised: {figures}."
    return f"Gold has fallen, and the proxy with it: {figures}."


def overoptimisation_section(run: RunFolder) -> dict[str, Any] | None:
    """What the report shows; None where it was not measured."""
    if not run.overoptimisation.is_file():
        return None
    curves = read_json(run.overoptimisation, Curves)
    with held_to_be_whole(run.overoptimisation):
        tables = {
            NAMES[name]: [
                [f"{point[label]:g}", f"{point['kl']:.3f}", f"{point['distance']:.3f}",
                 *(f"{point[key]:.3f} ± {point[f'{key}_se']:.3f}" for key in ("gold", "proxy"))]
                for point in curves[name]
            ]
            for name, label in (("best_of_n", "n"), ("ppo", "step"))
        }  # fmt: skip
        fits = [
            f"{NAMES[name]}: {FORMS[name]} with alpha {found['alpha']:.3f} "
            f"± {found['alpha_se']:.3f}, beta {found['beta']:.3f} ± {found['beta_se']:.3f}"
            + ("" if found["peak"] is None else f", highest at d = {found['peak']:.2f}")
            for name, found in curves["fits"].items()
            if found is not None
        ]
        plots = [
            ("Gold over distance", "Gold reward; lines: fits.", draw(curves, "gold")),
            ("Proxy over distance", "Raw score of the reward model.", draw(curves, "proxy")),
        ]
        words = verdict_of(curves["turn"])
    return {"words": words, "gold": curves["gold"], "tables": tables, "fits": fits,
            "plots": plots, "prompts": curves["prompts"], "samples": curves["samples"]}  # fmt: skip


def draw(curves: Curves, key: str) -> str:
    """Both curves with 95 % intervals, and for gold their fits, as inline SVG."""
    figure = Figure(figsize=(4.8, 2.9), layout="constrained")
    axes = figure.subplots()
    words: list[str] = []
    for colour, name in zip(LINES, ("ppo", "best_of_n"), strict=False):
        points, form = curves[name], curves["fits"][name]
        d, mean, error = ([point[k] for point in points] for k in ("distance", key, f"{key}_se"))
        bars = {"yerr": [NORMAL * each for each in error], "capsize": 2, "elinewidth": 1}
        axes.errorbar(d, mean, fmt="o", ms=3.5, color=colour, label=NAMES[name], **bars)
        if key == "gold" and form is not None:
            grid = np.linspace(0.0, max(d), 200)
            axes.plot(grid, mean[0] + fitted(form, name, grid), color=colour, linewidth=1.5)
        elif len(d) > 1:
            axes.plot(d, mean, color=colour, linewidth=0.8, alpha=0.6)
        words.append(f"{NAMES[name]} from {mean[0]:.3g} to {mean[-1]:.3g} at {d[-1]:.3g}")
    style(axes, "d = square root of the KL, nats", legend=True)
    return themed(figure, f"{key} over distance", f"{key}: {'; '.join(words)}.")
