"""Curves of a run as SVG text whose colours follow the page (light and dark).

`PANELS` lists the curves; the page around them is `page.py`.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chatllama.config.ppo import PpoSection
from chatllama.reporting.statistics import NORMAL
from chatllama.runs.folder import Stage

# Placeholders that `themed` turns into CSS variables of the page.
INK, FAINT, LIMIT = "#010203", "#040506", "#0a0b0c"
LINES = ("#111213", "#141516", "#171819")
VARIABLES = ("muted", "line", "limit", "curve1", "curve2", "curve3")
SMOOTH_FROM = 30
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One plot: its words (the title is unique), and label -> metric of each curve."""

    title: str
    explanation: str
    curves: dict[str, str]
    highest: float = math.inf
    """Of what is plotted, like 1 of a share: the axis does not go beyond."""


def _both(stage: Stage, metric: str) -> dict[str, str]:
    """Curves of a metric in training and on held-out data."""
    return {"training": f"{stage}/{metric}", "held out": f"{stage}/eval_{metric}"}


FIRST_ROW = 4
"""Panels of PPO that the page shows before all others, in one row."""
PANELS: dict[Stage, tuple[Panel, ...]] = {
    "ppo": (
        Panel(
            "Reward score (raw)",
            "Mean of what the reward gives the answers, as it gives it.",
            {"training": "ppo/rm_score_mean", "held out": "ppo/eval_score_mean"},
        ),
        Panel(
            "KL to the reference",
            "Nats per answer; how far the policy has moved from its start.",
            _both("ppo", "kl_sequence"),
        ),
        Panel("Answer length", "Tokens per sampled answer.", _both("ppo", "response_length")),
        Panel(
            "Answers that end by themselves",
            "Share that closes with the end-of-turn token (EOS) within the length limit.",
            _both("ppo", "eos_rate"),
            1.0,
        ),
        Panel(
            "Reward score (normalised)",
            "In deviations from the reference's mean score, less penalties; what PPO climbs.",
            {"training": "ppo/score_mean"},
        ),
        Panel(
            "Entropy",
            "Nats per token; near 0 the policy has stopped exploring.",
            {"entropy": "ppo/entropy"},
        ),
        Panel(
            "Clipped ratios",
            "Share of tokens left without a gradient by the clip range.",
            {"share": "ppo/clip_fraction"},
            1.0,
        ),
        Panel("Value loss", "Squared error of the value model.", {"loss": "ppo/value_loss"}),
        Panel(
            "Explained variance",
            "Share of the variance of the rewards to come that the value model explains.",
            {"explained": "ppo/explained_variance"},
            1.0,
        ),
    ),
    "reward": (
        Panel(
            "Reward model loss",
            "Pairwise Bradley-Terry loss; 0.693 is guessing.",
            _both("reward", "loss"),
        ),
        Panel(
            "Reward model accuracy",
            "Share of pairs in which the chosen answer scores higher.",
            _both("reward", "accuracy"),
            1.0,
        ),
    ),
    "sft": (Panel("SFT loss", "Cross-entropy per answer token, in nats.", _both("sft", "loss")),),
}

PRETRAINING = Panel(
    "Pretraining loss",
    "Cross-entropy per token of a backbone made from scratch, in nats.",
    {"training": "sft/loss"},
)


CRITIC = ("Value loss", "Explained variance")
SHAPED = "Reward score (normalised)"
TERM_MEAN, TERM_SHARE = "ppo/term_mean/", "ppo/term_share/"


def ppo_panels(section: PpoSection | None, lines: list[dict]) -> list[Panel]:
    """The panels of a run's third stage: a critic's where it has one, each reward term's."""
    panels = list(PANELS["ppo"])
    if section is not None and section.advantage != "gae":
        panels = [panel for panel in panels if panel.title not in CRITIC]
    if section is not None and section.score_normalization == "none":
        words = "The raw score, clipped, less penalties; what the policy climbs."
        shaped = {"title": "Reward score (less penalties)", "explanation": words}
        panels = [replace(panel, **shaped) if panel.title == SHAPED else panel for panel in panels]
    metrics = {name for line in lines for name in line}
    if names := sorted(m.removeprefix(TERM_MEAN) for m in metrics if m.startswith(TERM_MEAN)):
        panels += [
            Panel(
                "Reward terms",
                "Mean of what each term gives, before its weight.",
                {name: TERM_MEAN + name for name in names},
            ),
            Panel(
                "Share of each reward term",
                "Of the variation of the score: what the policy feels of it, with its weight.",
                {name: TERM_SHARE + name for name in names},
                1.0,
            ),
        ]
    return panels


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value with its neighbours, up to `window` values, fewer at the ends.

    The first is the first value itself: what was learned since does not raise where it began.
    """
    half = window // 2
    out = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + min(half, i) + 1]
        out.append(sum(near) / len(near))
    return out


def step_ticks(first: float, last: float) -> list[float]:
    """Some round steps from `first` to `last`, and `last` itself."""
    room = 0.1 * (last - first)
    ticks = MaxNLocator(4, integer=True).tick_values(first, last)
    return [*(float(tick) for tick in ticks if first <= tick < last - room), last]


def curve(lines: list[dict], metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was logged and finite."""
    points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def draw(
    panel: Panel, lines: list[dict], limit: float | None = None, *, small: bool = False
) -> str | None:
    """The panel as inline SVG; None if none of its metrics was logged.

    Args:
        limit: the Bayes limit of the accuracy, drawn as a dashed line.
        small: for a row of four.
    """
    found = {label: curve(lines, metric) for label, metric in panel.curves.items()}
    found = {label: points for label, points in found.items() if points[0]}
    if not found:
        return None
    figure = Figure(figsize=(2.7, 2.3) if small else (4.8, 2.5), layout="constrained")
    axes = figure.subplots()
    _plot_all(axes, found)
    if limit is not None:
        dashes = (0, (4, 3))
        axes.axhline(limit, color=LIMIT, linestyle=dashes, linewidth=1.4, label="Bayes limit")
    style(axes, "step", legend=len(found) > 1 or limit is not None)
    _fit(axes, panel, [steps for steps, _ in found.values()])
    words = (
        f"{label} from {values[0]:.3g} at step {steps[0]:g} to {values[-1]:.3g} at step "
        f"{steps[-1]:g}, lowest {min(values):.3g}, highest {max(values):.3g}"
        for label, (steps, values) in found.items()
    )
    return themed(figure, panel.title, f"{panel.title}: {'; '.join(words)}.")


def draw_bars(title: str, rows: Mapping[str, tuple[float, float]]) -> str:
    """A bar with its 95 % interval for each mean and its standard error, as inline SVG."""
    figure = Figure(figsize=(3.3, 0.9 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places, means = range(len(rows)), [mean for mean, _ in rows.values()]
    errors = [NORMAL * error if math.isfinite(error) else 0.0 for _, error in rows.values()]
    axes.barh(places, means, 0.6, alpha=0.75, color=LINES[: len(rows)])
    axes.errorbar(means, places, xerr=errors, fmt="none", ecolor=INK, linewidth=1.2, capsize=4)
    axes.axvline(0, color=INK, linewidth=1)
    style(axes, "", legend=False)
    axes.set_yticks(places, list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    words = (f"{name} {mean:.2f} ± {error:.2f}" for name, (mean, error) in rows.items())
    # The title is that of a curve, too, and ids come from it.
    return themed(figure, f"{title} bars", f"{title}: {'; '.join(words)}.")


def draw_runs(panel: Panel, runs: Mapping[str, list[dict]]) -> str | None:
    """The panel's first metric of several runs; None if none has logged it."""
    (metric,) = panel.curves.values()
    found = {name: curve(lines, metric) for name, lines in runs.items()}
    found = {name: points for name, points in found.items() if points[0]}
    if not found:
        return None
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
    axes = figure.subplots()
    _plot_all(axes, found)
    style(axes, "step", legend=len(found) <= 6)
    _fit(axes, panel, [steps for steps, _ in found.values()])
    words = (f"{name} ends at {values[-1]:.3g}" for name, (_, values) in found.items())
    return themed(figure, panel.title, f"{panel.title}: {'; '.join(words)}.")


def _plot_all(axes: Axes, found: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Every curve; after three, colours are repeated with other dashes."""
    for number, (name, (steps, values)) in enumerate(found.items()):
        dashes = DASHES[number // len(LINES) % len(DASHES)]
        _plot(axes, steps, values, name, LINES[number % len(LINES)], dashes)


def _fit(axes: Axes, panel: Panel, steps: list[list[float]]) -> None:
    """Axes of a panel: the last step has its tick, and none is beyond the highest value."""
    first, last = min(each[0] for each in steps), max(each[-1] for each in steps)
    axes.set_xticks(step_ticks(first, last) if last > first else [first])
    at_most(axes, panel.highest)


def at_most(axes: Axes, highest: float) -> None:
    """Ends the y axis at `highest` where only its margin would go beyond."""
    if axes.dataLim.y1 <= highest < axes.get_ylim()[1]:
        axes.set_ylim(top=highest)


def _plot(
    axes: Axes, steps: list[float], values: list[float], label: str, colour: str, dashes: str = "-"
) -> None:
    """One curve: points where few, the values faintly under their running mean where many."""
    look: dict[str, Any] = {"color": colour, "linestyle": dashes, "clip_on": False}
    if len(steps) < SMOOTH_FROM:
        size = 4 if len(steps) < 12 else 0
        axes.plot(steps, values, linewidth=1.8, label=label, marker="o", ms=size, **look)
        return
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.35, clip_on=False)
    mean = smooth(values, max(5, len(values) // 12))
    axes.plot(steps, mean, linewidth=2.0, label=label, **look)


def style(axes: Axes, xlabel: str, ylabel: str = "", *, legend: bool) -> None:
    """The look of all plots: quiet axes, a grid behind, text in the page's colour."""
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.margins(x=0.02, y=0.12)
    axes.locator_params(axis="y", nbins=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="best")


def themed(figure: Figure, title: str, words: str) -> str:
    """A figure as SVG element of a page: page colours, page font, unique ids, alt text.

    Args:
        figure: drawn in the placeholder colours.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg)|<(metadata|style).*?</\1>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    prefix = re.sub(r"[^a-z]+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}.", svg)
    for placeholder, variable in zip((INK, FAINT, LIMIT, *LINES), VARIABLES, strict=True):
        svg = svg.replace(placeholder, f"var(--{variable})")
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, head
    return f'<svg {box[0]} role="img" aria-label="{escape(words)}">{rest}'
