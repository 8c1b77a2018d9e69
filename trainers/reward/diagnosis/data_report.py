"""The data report of the reward model diagnosis: preference data before anything is trained.

It changes and refuses nothing. The trained model is examined in `model_report.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, cast

import numpy as np
from datasets import Dataset

from chatllama.reporting.statistics import FLIP_EVIDENCE
from data.batches import answer_pairs, ordered_pairs
from trainers.reward.data import Preferences
from trainers.reward.diagnosis.calibration import agreement, fit_flips, proportion

Rows = Sequence[Mapping[str, Any]]
Pair = tuple[bytes, bytes]
SAME_ANSWERS = ("chosen equals rejected", "all answers are equal", "answers are the same tokens")
SUSPECTS_SHOWN = 10


@dataclass(frozen=True)
class Concern:
    """A warning about data or model."""

    name: str
    text: str


def rows_of(examples: Dataset) -> Rows:
    """The examples with ids as int32 arrays, those that a source's `epochs` repeat only once."""
    rows: dict[str, dict[str, Any]] = {}
    for example in cast(Iterable[dict[str, Any]], examples):
        if example["where"] not in rows:
            ids = [np.array(answer, dtype=np.int32) for answer in example["answer_ids"]]
            rows[example["where"]] = {**example, "answer_ids": ids}
    return list(rows.values())


def examine_data(data: Preferences) -> dict[str, Any]:
    """Counts, repeats, contradictions, the length and word baselines, labels that look wrong."""
    train, held_out = rows_of(data.train), rows_of(data.held_out)
    seen, unseen = _places_of_pairs(train), _places_of_pairs(held_out)
    shared = {frozenset(pair) for pair in seen} & {frozenset(pair) for pair in unseen}
    words = proportion(agreement(word_gaps(train, held_out)), _weights(held_out))
    return {
        "training": _describe(train, seen),
        "held_out": _describe(held_out, unseen),
        "left_out": data.left_out,
        "shared_pairs": len(shared),
        "word_accuracy": asdict(words),
        "flips": doubtful_labels(train, word_gaps(train, train, folds=2), _weights(train)),
    }


def _weights(rows: Rows) -> np.ndarray:
    return np.asarray(answer_pairs(rows).weight, dtype=float)


def _places_of_pairs(rows: Rows) -> dict[Pair, list[str]]:
    """Digests of (better, worse), each with its prompt -> the records with that label."""
    found: dict[Pair, list[str]] = defaultdict(list)
    for row in rows:
        answers = [blake2b(ids.tobytes(), digest_size=16).digest() for ids in row["answer_ids"]]
        for i, j in ordered_pairs(row["ranks"]):
            found[answers[i], answers[j]].append(row["where"])
    return found


def _describe(rows: Rows, seen: Mapping[Pair, list[str]]) -> dict[str, Any]:
    """Counts of training or held-out data."""
    lengths = answer_lengths(rows)
    pairs = answer_pairs(rows)
    # As arrays: NumPy takes a tensor of one index for a number.
    better, worse = pairs.better.numpy(), pairs.worse.numpy()
    longer = agreement((lengths[better] - lengths[worse]).astype(float))
    twisted = [(a, b) for a, b in seen if (b, a) in seen and a < b]
    return {
        "prompts": len(rows),
        "answers": len(lengths),
        "pairs": len(longer),
        "answers_per_prompt": dict(sorted(Counter(len(row["ranks"]) for row in rows).items())),
        "mean_answer_tokens": float(lengths.mean()),
        "repeated_pairs": sum(len(places) - 1 for places in seen.values()),
        "contradicted_pairs": len(twisted),
        "contradictions": [[*seen[a, b][:1], *seen[b, a][:1]] for a, b in twisted[:SUSPECTS_SHOWN]],
        "longer_preferred": asdict(proportion(longer, np.asarray(pairs.weight, dtype=float))),
    }


def answer_lengths(rows: Rows) -> np.ndarray:
    """Tokens of every answer, end of turn included, without its prompt: (N,) int."""
    return np.array([len(ids) - row["prompt_length"] for row in rows for ids in row["answer_ids"]])


def word_gaps(train: Rows, judged: Rows, folds: int = 1) -> np.ndarray:
    """Log-odds by words alone that the better answer of a pair is the better one: (P,) float.

    Naive Bayes on the words (tokens) that only one answer of a pair has; it uses no grammar, no
    prompt and no meaning, and takes two passes over the data.

    Args:
        train: examples whose words are counted.
        judged: examples whose pairs are judged; `train` itself, with folds.
        folds: 1, or parts (by prompt) that are judged by the counts of the others.
    """
    size = 1 + max(ids.max() for rows in (train, judged) for r in rows for ids in r["answer_ids"])
    better, worse = np.ones((folds, size)), np.ones((folds, size))
    for row in train:
        for good, bad in _own_words(row):
            better[_fold(row, folds), good] += 1
            worse[_fold(row, folds), bad] += 1
    if folds > 1:
        better, worse = better.sum(0) - better, worse.sum(0) - worse
    odds = np.log(better / worse)
    return np.array(
        [
            odds[_fold(row, folds), good].sum() - odds[_fold(row, folds), bad].sum()
            for row in judged
            for good, bad in _own_words(row)
        ]
    )


def _own_words(row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """For each pair, the words that only its better and only its worse answer has."""
    words = [set(ids[row["prompt_length"] :].tolist()) for ids in row["answer_ids"]]
    pairs = ordered_pairs(row["ranks"])
    return [(sorted(words[i] - words[j]), sorted(words[j] - words[i])) for i, j in pairs]


def _fold(row: Mapping[str, Any], folds: int) -> int:
    """Equal for equal prompts, so that no fold is judged by its own prompts."""
    return int(row["answer_ids"][0][: row["prompt_length"]].sum()) % folds


def doubtful_labels(rows: Rows, gaps: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The share of labels that look wrong, its evidence, and the places of the most suspect."""
    flips = fit_flips(gaps, weights)
    places = [row["where"] for row in rows for _ in ordered_pairs(row["ranks"])]
    worst = np.argsort(-flips.suspicion, kind="stable")[:SUSPECTS_SHOWN]
    suspects = [{"where": places[i], "suspicion": float(flips.suspicion[i])} for i in worst]
    return {"share": flips.share, "evidence": flips.evidence, "suspects": suspects}


def data_concerns(found: Mapping[str, Any]) -> list[Concern]:
    """The warnings that follow from the findings of `examine_data`."""
    train, held_out = found["training"], found["held_out"]
    out = []
    for name, text in (
        ("repeated_pairs", "are in the training data more than once: they count double"),
        ("contradicted_pairs", "are labelled both ways: no model can fit both"),
    ):
        if train[name] > 0.01 * train["pairs"]:
            out.append(Concern(name, f"{train[name]} of {train['pairs']} training pairs {text}"))
    if found["shared_pairs"]:
        text = f"{found['shared_pairs']} held-out pairs are training pairs: accuracy is flattered"
        out.append(Concern("shared_pairs", text))
    same = sum(found["left_out"].get(reason, 0) for reason in SAME_ANSWERS)
    kept = train["prompts"] + held_out["prompts"]
    if same > 0.01 * kept:
        out.append(Concern("identical_answers", f"{same} records have equal answers; left out"))
    gone = sum(found["left_out"].values()) - same
    if gone > 0.2 * kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found["left_out"].items())
        text = f"{gone} examples left out or shortened, {kept} kept: {reasons}"
        out.append(Concern("left_out", text))
    longer = held_out["longer_preferred"]
    if longer["low"] > 0.55 or longer["high"] < 0.45:
        side = "longer" if longer["value"] > 0.5 else "shorter"
        agreeing = max(longer["value"], 1 - longer["value"])
        text = f"taking the {side} answer agrees with {agreeing:.1%} of the held-out labels"
        out.append(Concern("length_tells", text))
    if held_out["prompts"] < 200:
        text = f"{held_out['prompts']} held-out prompts: the accuracy's interval will be wide"
        out.append(Concern("few_held_out", text))
    return out + flip_concerns(found["flips"], "training pairs, judged by their words alone")


def flip_concerns(flips: Mapping[str, Any], what: str) -> list[Concern]:
    """A warning where wrong labels explain the gaps better than an unsure model does."""
    if flips["evidence"] < FLIP_EVIDENCE or flips["share"] < 0.05:
        return []
    places = ", ".join(suspect["where"] for suspect in flips["suspects"][:3])
    text = f"{flips['share']:.0%} of the labels look wrong ({what}); look at {places}"
    return [Concern("suspected_flips", text)]
