"""The page's sections on the reward: the terms of the score, and RUN/reward/doctor.json.

The findings are made in `trainers/reward/diagnosis/`; the HTML around them is `report.html.jinja`.
"""

from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chatllama.config.schema import Config
from chatllama.reporting.plots import (
    INK,
    LIMIT,
    LINES,
    TERM_MEAN,
    TERM_SHARE,
    at_most,
    curve,
    style,
    themed,
)
from chatllama.reporting.statistics import FLIP_EVIDENCE, interval_text
from chatllama.runs.folder import RunFolder
from chatllama.runtime.json_files import held_to_be_whole, read_json

Found = dict[str, Any]
PAIRS = "reward.data (those pairs)"
STEPS = "reward.epochs, reward.learning_rate, lora.r"
LENGTHS = "reward.data (pairs of equal length), ppo.length_penalty"
SCALE = "reward.label_smoothing, reward.center_coef; ppo.score_normalization evens it out for PPO"
KEYS = {
    "repeated_pairs": PAIRS,
    "contradicted_pairs": f"{PAIRS}, reward.label_smoothing (higher)",
    "shared_pairs": "reward.decontaminate (the held-out files)",
    "identical_answers": PAIRS,
    "left_out": "reward.max_length (higher)",
    "length_tells": LENGTHS,
    "few_held_out": "reward.eval_fraction (higher), reward.eval_data",
    "suspected_flips": f"{PAIRS}, reward.label_smoothing (higher)",
    "no_better_than_chance": f"reward.data (more or cleaner pairs), {STEPS}",
    "inverted": "reward.data (columns or verdicts of that source)",
    "no_better_than_length": f"{LENGTHS}, {STEPS}",
    "no_better_than_words": f"reward.data (more pairs), {STEPS}",
    "length_driven": LENGTHS,
    "length_bias": LENGTHS,
    "below_bayes": f"reward.data (more pairs), {STEPS}",
    "overconfident": SCALE,
    "underconfident": SCALE,
    "padding": "backbone.attn_implementation (sdpa), backbone.dtype (float32)",
}
"""Warning of doctor.json -> config keys to change, and how."""


def diagnosis_section(run: RunFolder) -> Found | None:
    """Warnings with keys, groups of numbers and plots; None where no reward model was examined."""
    path = run.reward_diagnosis
    if not path.is_file():
        return None
    found = read_json(path)
    with held_to_be_whole(path):
        plots = _plots(found["model"]) if found["model"] else []
        warnings = [{**each, "knob": KEYS.get(each["name"])} for each in found["warnings"]]
        groups = _groups(found)
        count = sum(len(rows) for rows in groups.values())
        return {"warnings": warnings, "groups": groups, "count": count, "plots": plots}


def _groups(found: Found) -> dict[str, list[tuple[str, str]]]:
    """Group -> name and value of every number in doctor.json that the section shows."""
    train, held_out, model = found["data"]["training"], found["data"]["held_out"], found["model"]
    groups = {
        "Pairs": [
            ("training pairs (prompts)", f"{train['pairs']} ({train['prompts']})"),
            ("held-out pairs (prompts)", f"{held_out['pairs']} ({held_out['prompts']})"),
            ("training pairs repeated", str(train["repeated_pairs"])),
            ("training pairs labelled both ways", str(train["contradicted_pairs"])),
            ("records left out or shortened", str(sum(found["data"]["left_out"].values()))),
        ],
        "What needs no reward model": [
            ("accuracy of the longer answer", interval_text(**held_out["longer_preferred"])),
            ("accuracy of words alone", interval_text(**found["data"]["word_accuracy"])),
        ],
    }
    if model is None:
        return groups
    accuracy = [("accuracy of the reward model", interval_text(**model["accuracy"]))]
    if model["bayes_accuracy"] is not None:
        accuracy.append(("Bayes limit", f"{model['bayes_accuracy']:.3f}"))
    calibration, length, flips = model["calibration"], model["length"], model["flips"]
    errors = f"{calibration['error']:.3f} ({calibration['chance_error']:.3f})"
    wrong = f"{flips['share']:.0%}" if flips["evidence"] > FLIP_EVIDENCE else "none shown"
    evidence = f"likelihood ratio {flips['evidence']:.1f}, counts from {FLIP_EVIDENCE}"
    groups |= {
        "Accuracy": accuracy,
        "Length": [
            ("accuracy with length balanced", interval_text(**length["controlled_accuracy"])),
            ("accuracy on pairs of equal length", interval_text(**length["matched_accuracy"])),
            ("correlation of score and length", f"{length['score_correlation']:+.2f}"),
        ],
        "Scores and labels": [
            ("calibration error (by chance)", errors),
            ("scale that would fit the scores best", f"{calibration['best_scale']:.2f}"),
            ("labels that look wrong", f"{wrong} ({evidence})"),
            ("largest change by padding", f"{model['padding']['error']:.1e}"),
        ],
    }
    if len(model["members"]) > 1:
        each = ", ".join(f"{member['value']:.3f}" for member in model["members"])
        groups["Ensemble"] = [
            ("accuracy of the ensemble's members", each),
            ("pairs on which they disagree", f"{model['disagreement']:.1%}"),
        ]
    return groups


def reward_terms(cfg: Config | None, lines: list[dict[str, Any]]) -> list[list[str]]:
    """Name, source, weight, mean at the start and the end, and last share of each term.

    Without means and shares where there is one term only: they are the score's.

    Args:
        lines: metrics of PPO.
    """
    found: list[list[str]] = []
    for source in cfg.ppo.rewards if cfg is not None else ():
        kinds = {"reward adapter": source.adapter, "function": source.function}
        kinds |= {"reward model": source.model, "servers": ", ".join(source.urls) or None}
        what = next(f"{kind}: {value}" for kind, value in kinds.items() if value is not None)
        means = curve(lines, TERM_MEAN + source.label)[1]
        shares = curve(lines, TERM_SHARE + source.label)[1]
        row = [source.label, what, f"{source.weight:g}"]
        if means and shares:
            row += [f"{means[0]:.3g}", f"{means[-1]:.3g}", f"{shares[-1]:.0%}"]
        found.append(row)
    return found


def _plots(model: Found) -> list[tuple[str, str, str]]:
    """Title, explanation and SVG of each plot."""
    plots = []
    for title, explanation, draw in (
        ("Calibration", "How sure the model is of a pair, and how often it is right.", _draw_bins),
        ("Score differences", "Preferred less other answer; below 0 it is wrong.", _draw_gaps),
        ("Accuracy by length", "By how much longer the preferred answer is.", _draw_lengths),
    ):
        figure = Figure(figsize=(3.9, 2.8), layout="constrained")
        words = draw(figure.subplots(), model)
        plots.append((title, explanation, themed(figure, title, f"{title}: {words}")))
    return plots


def _draw_bins(axes: Axes, model: Found) -> str:
    """Reliability with 95 % intervals, points sized by their share of the pairs; its alt text."""
    points = model["calibration"]["bins"]
    x, y = [p["confidence"] for p in points], [p["accuracy"] for p in points]
    sizes = [4 + 250 * p["share"] for p in points]
    axes.plot([0.5, 1], [0.5, 1], color=LIMIT, linestyle=(0, (4, 3)), label="calibrated")
    axes.scatter(x, y, s=sizes, color=LINES[0], label="held-out pairs", clip_on=False)
    axes.vlines(x, [p["low"] for p in points], [p["high"] for p in points], LINES[0], linewidth=1)
    style(axes, "confidence: sigmoid of the difference", "accuracy", legend=True)
    at_most(axes, 1.0)
    axes.set_xlim(0.49, 1.0)
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
    at_most(axes, 1.0)
    return "; ".join(f"{b['from']:g} to {b['to']:g}: {b['accuracy']['value']:.2f}" for b in bins)
