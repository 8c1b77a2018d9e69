"""The reward model diagnosis: what a trained model's scores of held-out answers are good for.

Its data report is in `data_report.py`, the statistics are in `calibration.py`. All findings are
written to RUN/reward/doctor.json, which the page shows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset

from chatllama.config.schema import RewardSection
from chatllama.reporting.summary import BAYES_SLACK
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import rank
from chatllama.runtime.files import write_json
from data.batches import answer_pairs
from trainers.reward.data import Preferences
from trainers.reward.diagnosis.calibration import (
    agreement,
    calibration,
    histogram,
    log_loss,
    proportion,
    weighted_mean,
)
from trainers.reward.diagnosis.data_report import (
    Concern,
    Rows,
    answer_lengths,
    data_concerns,
    doubtful_labels,
    examine_data,
    flip_concerns,
)
from trainers.reward.diagnosis.length import about_length
from trainers.reward.evaluate import Member, PaddingError


def examine_model(
    held_out: Dataset,
    scores: Sequence[Sequence[float]],
    section: RewardSection,
    bayes_accuracy: float | None,
    padding: PaddingError,
) -> dict[str, Any]:
    """Accuracy, calibration, margins, length bias, doubtful labels, agreement of an ensemble.

    Args:
        scores: (members, N), of all answers, example by example.
        section: whether sigmoid(gap) was trained as a probability follows from it.
        bayes_accuracy: the best that is possible, if known.
        padding: the largest of the members.
    """
    rows: Rows = held_out.to_list()
    pairs = answer_pairs(rows)
    better, worse = pairs.better.numpy(), pairs.worse.numpy()
    weights = np.asarray(pairs.weight, dtype=float)
    each = np.asarray(scores, dtype=float)
    mean = each.mean(0)
    gaps, member_gaps = mean[better] - mean[worse], each[:, better] - each[:, worse]
    distribution = {"mean": float(gaps.mean()), "sd": float(gaps.std())}
    edges, shares = histogram(gaps, weights)
    differing = (np.sign(member_gaps) != np.sign(member_gaps[0])).any(0)
    return {
        "accuracy": asdict(proportion(agreement(gaps), weights)),
        "bayes_accuracy": bayes_accuracy,
        "log_loss": log_loss(gaps, weights),
        "calibration": {
            **calibration(gaps, weights),
            "is_probability": section.margin_coef == 0 and section.label_smoothing == 0,
        },
        "gaps": {**distribution, "edges": edges, "shares": shares},
        "length": about_length(answer_lengths(rows), mean, better, worse, weights),
        "flips": doubtful_labels(rows, gaps, weights),
        "sources": _by_source(rows, pairs.prompt.numpy(), gaps, weights),
        "padding": asdict(padding),
        "members": [asdict(proportion(agreement(own), weights)) for own in member_gaps],
        "disagreement": weighted_mean(differing, weights),
    }


def _by_source(
    rows: Rows, prompt: np.ndarray, gaps: np.ndarray, weights: np.ndarray
) -> dict[str, Any]:
    """Accuracy for every file or data set, from the places of its records."""
    sources = [row["where"].rsplit(":", 1)[0] for row in rows]
    of_pair = np.array([sources[number] for number in prompt])
    return {
        source: asdict(proportion(agreement(gaps), weights * (of_pair == source)))
        for source in sorted(set(sources))
    }


def model_concerns(found: Mapping[str, Any], word_accuracy: float) -> list[Concern]:
    """The warnings that follow from the findings of `examine_model`.

    `word_accuracy` is that of the word baseline on the same pairs.
    """
    accuracy, length, calibration = found["accuracy"], found["length"], found["calibration"]
    out = []
    if accuracy["low"] <= 0.5:
        text = f"accuracy {_interval(accuracy)}: no better than guessing; PPO will refuse it"
        out.append(Concern("no_better_than_chance", text))
    for source, own in found["sources"].items():
        if own["high"] < 0.5:
            text = f"accuracy on {source} is {_interval(own)}: are chosen and rejected swapped?"
            out.append(Concern("inverted", text))
    longer = length["longer_preferred"]["value"]
    for what, baseline in (("length", max(longer, 1 - longer)), ("words", word_accuracy)):
        if accuracy["value"] <= baseline and accuracy["low"] > 0.5:
            text = f"accuracy {accuracy['value']:.3f}; {what} alone give {baseline:.3f}"
            out.append(Concern(f"no_better_than_{what}", text))
    if length["controlled_accuracy"]["low"] <= 0.5 < accuracy["low"]:
        text = f"with length balanced, accuracy is {_interval(length['controlled_accuracy'])}"
        out.append(Concern("length_driven", text))
    sides = [(length[f"better_is_{side}"], side) for side in ("longer", "shorter")]
    (worse, _), (better, side) = sorted(sides, key=lambda each: each[0]["value"])
    apart = better["value"] - worse["value"]
    if apart > math.hypot(better["value"] - better["low"], worse["high"] - worse["value"]):
        text = (
            f"it is right on {better['value']:.1%} of the pairs whose preferred answer is {side}, "
            f"on {worse['value']:.1%} of the others (correlation of score and length "
            f"{length['score_correlation']:+.2f})"
        )
        out.append(Concern("length_bias", text))
    limit = found["bayes_accuracy"]
    if limit is not None and accuracy["value"] < limit - BAYES_SLACK:
        out.append(Concern("below_bayes", f"accuracy {accuracy['value']:.3f} of {limit:.3f}"))
    if calibration["is_probability"] and calibration["error"] > 0.05 + calibration["chance_error"]:
        kind = "overconfident" if calibration["best_scale"] < 1 else "underconfident"
        text = (
            f"calibration error {calibration['error']:.3f} ({calibration['chance_error']:.3f} by "
            f"chance); scores times {calibration['best_scale']:.2f} would fit best"
        )
        out.append(Concern(kind, text))
    padding = found["padding"]
    if not padding["error"] <= padding["tolerance"]:
        text = f"scores change by up to {padding['error']:.2g} with padding or neighbours"
        out.append(Concern("padding", text))
    return out + flip_concerns(found["flips"], "held-out pairs, judged by the reward model")


def open_diagnosis(run: RunFolder, data: Preferences) -> dict[str, Any]:
    """Examines the data, prints the findings and begins RUN/reward/doctor.json; rank 0 only.

    The other ranks get an empty dict, and wait at their next collective call.
    """
    if rank() != 0:
        return {}
    found = examine_data(data)
    _publish(run, diagnosis(found), _data_summary(found))
    return found


def close_diagnosis(
    run: RunFolder,
    section: RewardSection,
    data: Preferences,
    members: Sequence[Member],
    examined: Mapping[str, Any],
) -> None:
    """Examines the members' mean score, prints the findings and completes doctor.json; rank 0 only.

    `examined` comes from `open_diagnosis`.
    """
    if rank() != 0:
        return
    padding = max((member.padding for member in members), key=lambda p: p.error / p.tolerance)
    scores = [member.scores for member in members]
    found = examine_model(data.held_out, scores, section, data.bayes_accuracy, padding)
    _publish(run, diagnosis(examined, found), _model_summary(found))


def _publish(run: RunFolder, content: Mapping[str, Any], summary: str) -> None:
    """Writes doctor.json; prints the summary and one line for each warning."""
    write_json(run.reward_diagnosis, content)
    warnings = [f"  warning {w['name']}: {w['text']}" for w in content["warnings"]]
    print("\n".join([summary, *(warnings or ["  no warnings"])]), flush=True)


def diagnosis(data: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of doctor.json: findings on data and trained model, and every warning."""
    concerns = data_concerns(data)
    if model is not None:
        concerns += model_concerns(model, data["word_accuracy"]["value"])
    return {"data": data, "model": model, "warnings": [asdict(concern) for concern in concerns]}


def _data_summary(found: Mapping[str, Any]) -> str:
    """Lines for the terminal, before training."""
    train, held_out = found["training"], found["held_out"]
    longer, words = held_out["longer_preferred"], found["word_accuracy"]
    return (
        f"reward model diagnosis: {train['pairs']} training pairs of {train['prompts']} prompts, "
        f"{held_out['pairs']} held out of {held_out['prompts']}; {train['repeated_pairs']} "
        f"repeated, {train['contradicted_pairs']} labelled both ways\n"
        f"  baselines on held-out pairs: the longer answer {_interval(longer)}, words alone "
        f"{_interval(words)}"
    )


def _model_summary(found: Mapping[str, Any]) -> str:
    """Lines for the terminal, after training."""
    length, calibration = found["length"], found["calibration"]
    limit = found["bayes_accuracy"]
    bayes = "" if limit is None else f", Bayes limit {limit:.3f}"
    lines = [
        f"reward model diagnosis: accuracy {_interval(found['accuracy'])}{bayes}, "
        f"length-controlled {_interval(length['controlled_accuracy'])}",
        f"  calibration error {calibration['error']:.3f}, correlation of score and length "
        f"{length['score_correlation']:+.2f}, padding error {found['padding']['error']:.1e}",
    ]
    if len(found["members"]) > 1:
        each = ", ".join(f"{member['value']:.3f}" for member in found["members"])
        lines.append(f"  members {each}; they disagree on {found['disagreement']:.1%} of the pairs")
    return "\n".join(lines)


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f})"
