"""The report's section on the reward model: what the RM doctor found, from RUN/reward/doctor.json.

The findings are made in `trainers/reward/diagnosis/`.
"""

import json
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from chatllama.reporting.plots import (
    INK,
    LIMIT,
    LINES,
    style,
    themed,
)
from chatllama.reporting.statistics import FLIP_EVIDENCE
from chatllama.runs.folder import RunFolder

Found = dict[str, Any]
FIGSIZE = (4.8, 2.9)


def doctor_body(run: RunFolder) -> str:
    """HTML below the section's heading; empty where no reward model was examined."""
    path = run.reward_diagnosis
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    items = "".join(
        f'<li class="neutral"><strong>{escape(w["name"])}</strong>: {escape(w["text"])}.</li>'
        for w in found["warnings"]
    )
    warnings = f'<ul class="findings">{items}</ul>' if items else '<p class="muted">No warning.</p>'
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in figures(found)
    )
    table = f'<div class="card"><table><tbody>{rows}</tbody></table></div>'
    return warnings + table + (_plots(found["model"]) if found["model"] else "")


def figures(found: Found) -> list[tuple[str, str]]:
    """Name and value of every number that the section shows.

    Args:
        found: what doctor.json holds.
    """
    train, held_out, model = found["data"]["training"], found["data"]["held_out"], found["model"]
    rows = [
        ("training pairs (prompts)", f"{train['pairs']} ({train['prompts']})"),
        ("held-out pairs (prompts)", f"{held_out['pairs']} ({held_out['prompts']})"),
        ("training pairs repeated", str(train["repeated_pairs"])),
        ("training pairs labelled both ways", str(train["contradicted_pairs"])),
        ("records left out or shortened", str(sum(found["data"]["left_out"].values()))),
        ("accuracy of the longer answer", interval(held_out["longer_preferred"])),
        ("accuracy of words alone", interval(found["data"]["word_accuracy"])),
    ]
    if model is None:
        return rows
    rows.append(("accuracy of the reward model", interval(model["accuracy"])))
    if model["bayes_accuracy"] is not None:
        rows.append(("Bayes limit", f"{model['bayes_accuracy']:.3f}"))
    calibration, length = model["calibration"], model["length"]
    rows += [
        ("the same with length balanced", interval(length["controlled_accuracy"])),
        ("the same on pairs of equal length", interval(length["matched_accuracy"])),
        ("correlation of score and length", f"{length['score_correlation']:+.2f}"),
        (
            "calibration error (by chance)",
            f"{calibration['error']:.3f} ({calibration['chance_error']:.3f})",
        ),
        ("scale that would fit the scores best", f"{calibration['best_scale']:.2f}"),
        ("labels that look wrong", _flips(model["flips"])),
        ("largest change by padding", f"{model['padding']['error']:.1e}"),
    ]
    if len(model["members"]) > 1:
        each = ", ".join(f"{member['value']:.3f}" for member in model["members"])
        rows.append(("accuracy of the ensemble's members", each))
        rows.append(("pairs on which they disagree", f"{model['disagreement']:.1%}"))
    return rows


def _flips(flips: Found) -> str:
    shown = f"{flips['share']:.0%}" if flips["evidence"] > FLIP_EVIDENCE else "none shown"
    return f"{shown} (likelihood ratio {flips['evidence']:.1f}, counts from {FLIP_EVIDENCE})"


def interval(found: dict[str, float]) -> str:
    """A share with its 95 % interval."""
    return f"{found['value']:.3f} ({found['low']:.3f}\N{EN DASH}{found['high']:.3f})"


def _plots(model: Found) -> str:
    blocks = ""
    for title, words, figure in (
        ("Calibration", "How sure the model is of a pair, and how often it is right.", _draw_bins),
        ("Score differences", "Preferred less other answer; below 0 it is wrong.", _draw_gaps),
        ("Accuracy by length", "By how much longer the preferred answer is.", _draw_lengths),
    ):
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
            svg = themed(figure(model), title, f"{title}: {alternative(title, model)}")
        blocks += (
            f'<figure class="card"><h3>{title}</h3><figcaption>{words}</figcaption>{svg}</figure>'
        )
    return f'<div class="plots">{blocks}</div>'


def alternative(title: str, model: Found) -> str:
    """What a reader who cannot see a plot is told."""
    if title == "Calibration":
        points = model["calibration"]["bins"]
        return "; ".join(f"says {p['confidence']:.2f}, is {p['accuracy']:.2f}" for p in points)
    if title == "Score differences":
        return f"mean {model['gaps']['mean']:.2f}, deviation {model['gaps']['sd']:.2f}"
    bins = model["length"]["by_difference"]
    return "; ".join(f"{b['from']:g} to {b['to']:g}: {b['accuracy']['value']:.2f}" for b in bins)


def _draw_bins(model: Found) -> Figure:
    """Reliability plot with 95 % intervals; the area of a point is its share of the pairs."""
    figure = Figure(figsize=FIGSIZE, layout="constrained")
    axes = figure.subplots()
    points = model["calibration"]["bins"]
    axes.plot([0.5, 1], [0.5, 1], color=LIMIT, linestyle=(0, (4, 3)), label="calibrated")
    x = [p["confidence"] for p in points]
    axes.scatter(
        x,
        [p["accuracy"] for p in points],
        s=[4 + 250 * p["share"] for p in points],
        color=LINES[0],
        label="held-out pairs",
    )
    axes.vlines(x, [p["low"] for p in points], [p["high"] for p in points], LINES[0], linewidth=1)
    axes.set_ylabel("accuracy", color=INK, fontsize=9)
    style(axes, "confidence: sigmoid of the difference", legend=True)
    return figure


def _draw_gaps(model: Found) -> Figure:
    figure = Figure(figsize=FIGSIZE, layout="constrained")
    axes = figure.subplots()
    edges, shares = model["gaps"]["edges"], model["gaps"]["shares"]
    colours = [LINES[0] if (a + b) / 2 > 0 else LINES[1] for a, b in pairwise(edges)]
    axes.bar(edges[:-1], shares, edges[1] - edges[0], align="edge", color=colours)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_ylabel("share of pairs", color=INK, fontsize=9)
    style(axes, "score difference", legend=False)
    return figure


def _draw_lengths(model: Found) -> Figure:
    figure = Figure(figsize=FIGSIZE, layout="constrained")
    axes = figure.subplots()
    bins = [b for b in model["length"]["by_difference"] if b["share"]]
    values = [b["accuracy"]["value"] for b in bins]
    errors = [
        [value - b["accuracy"]["low"] for value, b in zip(values, bins, strict=True)],
        [b["accuracy"]["high"] - value for value, b in zip(values, bins, strict=True)],
    ]
    names = [f"{b['from']:+.0%} to\n{b['to']:+.0%}" for b in bins]
    axes.bar(range(len(bins)), values, 0.7, color=LINES[0])
    axes.errorbar(range(len(bins)), values, errors, fmt="none", ecolor=INK, linewidth=1, capsize=3)
    axes.axhline(0.5, color=LIMIT, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(bins)), names)
    axes.set_ylabel("accuracy", color=INK, fontsize=9)
    style(axes, "length of the preferred answer against the other's", legend=False)
    return figure
