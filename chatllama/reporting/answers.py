"""Held-out answers of RUN/evaluation.json for the page: best, median, worst, most lost, and all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """A held-out prompt with the answers of the roles."""

    row: int
    """Its place among the held-out prompts."""
    prompt: str
    answers: list[tuple[str, str, float | None]]
    """Label of the role, its answer, the value of that."""
    values: dict[str, float] = field(default_factory=dict)
    """Of the roles."""
    heads: list[str] = field(default_factory=list)
    """Why it is shown first; empty for the others."""


@dataclass(frozen=True)
class Answers:
    """What the page shows of evaluation.json."""

    judge: str
    """Name of the values."""
    first: list[Sample]
    others: list[Sample]
    words: str
    """On how many prompts PPO lost, as far as that is known."""


def telling_rows(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, int]:
    """Where the answers lie that say most about `ours`: best, median, worst, most lost.

    The median is the lower one; of equal answers the first is taken, for the best the last.
    "Most lost" is absent where no answer is worse than that of `theirs`, which may be empty.
    """
    order = sorted(range(len(ours)), key=ours.__getitem__)
    found = {"Best": order[-1], "Median": order[(len(order) - 1) // 2], "Worst": order[0]}
    changes = [a - b for a, b in zip(ours, theirs, strict=False)]
    if changes and min(changes) < 0:
        found["Most lost"] = changes.index(min(changes))
    return found


def read_answers(content: dict[str, Any], start: str, labels: Mapping[str, str]) -> Answers:
    """The answers, those that say most about PPO first.

    Args:
        content: of evaluation.json. `judged`, which older runs lack, has the values of all prompts;
            texts are kept of some only, in older runs of the first ones.
        start: the role that PPO started from.
        labels: names of the roles.
    """
    judge, samples = "reward score (raw)", list[Sample]()
    for place, kept in enumerate(content["samples"]):
        if kept.get("gold"):
            judge = "gold score"
        values = kept.get("gold") or kept.get("score") or {}
        answers = [(label, str(kept[role]), values.get(role)) for role, label in labels.items()
                   if kept.get(role) is not None]  # fmt: skip
        samples.append(Sample(kept.get("row", place), kept["prompt"], answers, values))
    judged = content["judged"]["values"] if "judged" in content else {}
    words = _head(samples, start, judged, labels[start])
    if start in judged:
        words = f"{_lost(judged['ppo'], judged[start], labels['ppo'], labels[start])} {words}"
    first = sorted((s for s in samples if s.heads), key=lambda s: -s.values["ppo"])
    return Answers(judge, first, [sample for sample in samples if not sample.heads], words)


def _head(
    samples: list[Sample], start: str, judged: Mapping[str, list[float]], against: str
) -> str:
    """Names PPO's best, median and worst answer and that which lost most; says if none did.

    Of all answers where their texts are kept, else of those kept.
    """
    kept = {sample.row: sample for sample in samples if "ppo" in sample.values}
    if not kept:
        return ""
    ours = judged.get("ppo", [])
    rows = telling_rows(ours, judged.get(start, [])) if ours else {}
    of, count = f"of all {len(ours)}", len(ours)
    if not rows or not kept.keys() >= set(rows.values()):
        of, count = f"of the {len(kept)} kept", len(kept)
        some = list(kept)
        values = [kept[row].values for row in some]
        theirs = [each[start] for each in values if start in each]
        rows = telling_rows([each["ppo"] for each in values], theirs)
        rows = {name: some[place] for name, place in rows.items()}
    for name, row in rows.items():
        sample = kept[row]
        head = f"{name} {of}"
        if name == "Most lost":
            change = sample.values["ppo"] - sample.values[start]
            head = f"Lost most against {against}: {change:+.2f}"
        sample.heads.append(head)
    if "Most lost" in rows or not any(start in sample.values for sample in kept.values()):
        return ""
    return f"None of the {count} answers is worse than that of {against}."


def _lost(ours: list[float], theirs: list[float], name: str, start: str) -> str:
    """On how many prompts PPO is better, equal and worse."""
    pairs = list(zip(ours, theirs, strict=True))
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return (
        f"Of all {len(pairs)} prompts, {name}'s answer is better than that of {start} on {better}, "
        f"equal on {len(pairs) - better - worse} and worse on {worse}."
    )
