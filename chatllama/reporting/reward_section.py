"""The page's section on the reward model, from RUN/reward/doctor.json.

The findings are made in `trainers/reward/diagnosis/`; the HTML around them is `report.html.jinja`.
"""

from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chatllama.reporting.plots import INK, LIMIT, LINES, style, themed
from chatllama.reporting.statistics import FLIP_EVIDENCE, interval_text
from chatllama.runs.folder import RunFolder
from chatllama.runtime.json_files import held_to_be_whole, read_json

Found = dict[str, Any]


def diagnosis_section(run: RunFolder) -> Found | None:
    """Warnings, rows of numbers and plots; None where no reward model was examined."""
    path = run.reward_diagnosis
    if not path.is_file():
        return None
    found = read_json(path)
    with held_to_be_whole(path):
        plots = _plots(found["model"]) if found["model"] else []
        return {"warnings": found["warnings"], "rows": _rows(found), "plots": plots}


def _rows(found: Found) -> list[tuple[str, str]]:
    """Name and value of every number in doctor.json that the section shows."""
    train, held_out, model = found["data"]["training"], found["data"]["held_out"], found["model"]
    rows = [
        ("training pairs (prompts)", f"{train['pairs']} ({train['prompts']})"),
        ("held-out pairs (prompts)", f"{held_out['pairs']} ({held_out['prompts']})"),
        ("training pairs repeated", str(train["repeated_pairs"])),
        ("training pairs labelled both ways", str(train["contradicted_pairs"])),
        ("records left out or shortened", str(sum(found["data"]["left_out"].values()))),
        ("accuracy of the longer answer", interval_text(**held_out["longer_preferred"])),
        ("accuracy of words alone", interval_text(**found["data"]["word_accuracy"])),
    ]
    if model is None:
        return rows
    rows.append(("accuracy of the reward model", interval_text(**model["accuracy"])))
    if model["bayes_accuracy"] is not None:
        rows.append(("Bayes limit", f"{model['bayes_accuracy']:.3f}"))
    calibration, length, flips = model["calibration"], model["length"], model["flips"]
    errors = f"{calibration['error']:.3f} ({calibration['chance_error']:.3f})"
    wrong = f"{flips['share']:.0%}" if flips["evidence"] > FLIP_EVIDENCE else "none shown"
    evidence = f"likelihood ratio {flips['evidence']:.1f}, counts from {FLIP_EVIDENCE}"
    rows += [
        ("the same with length balanced", interval_text(**length["controlled_accuracy"])),
        ("the same on pairs of equal length", interval_text(**length["matched_accuracy"])),
        ("correlation of score and length", f"{length['score_correlation']:+.2f}"),
        ("calibration error (by chance)", errors),
        ("scale that would fit the scores best", f"{calibration['best_scale']:.2f}"),
        ("labels that look wrong", f"{wrong} ({evidence})"),
        ("largest change by padding", f"{model['padding']['error']:.1e}"),
    ]
    if len(model["members"]) > 1:
        each = ", ".join(f"{member['value']:.3f}" for member in model["members"])
        rows.append(("accuracy of the ensemble's members", each))
        rows.append(("pairs on which they disagree", f"{model['disagreement']:.1%}"))
    return rows


def _plots(model: Found) -> list[tuple[str, str, str]]:
    """Title, explanation and SVG of each plot."""
    plots = []
    for title, explanation, draw in (
        ("Calibration", "How sure the model is of a pair, and how often it is right.", _draw_bins),
        ("Score differences", "Preferred less other answer; below 0 it is wrong.", _draw_gaps),
        ("Accuracy by length", "By how much longer the preferred answer is.", _draw_lengths),
    ):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        words = draw(figure.subplots(), model)
        plots.append((title, explanation, themed(figure, title, f"{title}: {words}")))
    return plots


def _draw_bins(axes: Axes, model: Found) -> str:
    """Reliability with 95 % intervals, points sized by their share of the pairs; its alt text."""
    points = model["calibration"]["bins"]
    x, y = [p["confidence"] for p in points], [p["accuracy"] for p in points]
    sizes = [4 + 250 * p["share"] for p in points]
    axes.plot([0.5, 1], [0.5, 1], color=LIMIT, linestyle=(0, (4, 3)), label="calibrated")
    axes.scatter(x, y, s=sizes, color=LINES[0], label="held-out pairs")
    axes.vlines(x, [p["low"] for p in points], [p["high"] for p in points], LINES[0], linewidth=1)
    style(axes, "confidence: sigmoid of the difference", "accuracy", legend=True)
    return "; ".join(f"says {p['confidence']:.2f}, is {p['accuracy']:.2f}" for p in points)


def _draw_gaps(axes: Axes, model: Found) -> str:
    """Histogram of score differences; its alt text."""
    edges, shares = model["gaps"]["edges"], model["gaps"]["shares"]
    colours = [LINES[0] if (a + b) / 2 > 0 else LINES[1] for a, b in pairwise(edges)]
    axes.bar(edges[:-1], shares, edges[1] - edges[0], align="edge", color=colours)
    axes.axvline(0, color=INK, linewidth=1)
    style(axes, "score difference", "share of pairs", legend=False)
    return f"mean {model['gaps']['mean']:.2f}, deviation {model['gaps']['sd']:.2f}"


def _draw_lengths(axes: Axes, model: Found) -> str:
    """Accuracy by difference of lengths; its alt text."""
    bins = model["length"]["by_difference"]
    filled = [b for b in bins if b["share"]]
    places = range(len(filled))
    found = [b["accuracy"] for b in filled]
    values = [a["value"] for a in found]
    errors = [[a["value"] - a["low"] for a in found], [a["high"] - a["value"] for a in found]]
    axes.bar(places, values, 0.7, color=LINES[0])
    axes.errorbar(places, values, errors, fmt="none", ecolor=INK, linewidth=1, capsize=3)
    axes.axhline(0.5, color=LIMIT, linestyle=(0, (4, 3)))
    axes.set_xticks(places, [f"{b['from']:+.0%} to\n{b['to']:+.0%}" for b in filled])
    style(axes, "length of the preferred answer against the other's", "accuracy", legend=False)
    return "; ".join(f"{b['from']:g} to {b['to']:g}: {b['accuracy']['value']:.2f}" for b in bins)
