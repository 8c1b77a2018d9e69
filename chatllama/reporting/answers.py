"""Held-out answers of RUN/evaluation.json for the page: best, median, worst, most lost, and all."""

from dataclasses import dataclass, field
from typing import Any

from chatllama.reporting.summary import ROWS


@dataclass
class Sample:
    """A held-out prompt with the answers of the roles."""

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


def read_answers(content: dict[str, Any], start: str) -> Answers:
    """The answers, those that say most about PPO first.

    Args:
        content: of evaluation.json. `judged`, which older runs lack, has the values of all prompts;
            texts are kept of the first ones only.
        start: the role that PPO started from.
    """
    judge, samples = "reward score (raw)", []
    for kept in content["samples"]:
        if kept.get("gold"):
            judge = "gold score"
        values = kept.get("gold") or kept.get("score") or {}
        answers = [(label, str(kept[role]), values.get(role)) for role, label in ROWS
                   if kept.get(role) is not None]  # fmt: skip
        samples.append(Sample(kept["prompt"], answers, values))
    judged = content["judged"]["values"] if "judged" in content else {}
    words = _head(samples, start, judged.get("ppo", []))
    if start in judged:
        words = f"{_lost(judged['ppo'], judged[start], dict(ROWS)[start])} {words}"
    first = sorted((s for s in samples if s.heads), key=lambda s: -s.values["ppo"])
    return Answers(judge, first, [sample for sample in samples if not sample.heads], words)


def _head(samples: list[Sample], start: str, all_values: list[float]) -> str:
    """Names PPO's best, median and worst answer and that which lost most; says if none did."""
    ranked = sorted((s for s in samples if "ppo" in s.values), key=lambda s: s.values["ppo"])
    if not ranked:
        return ""

    def place(sample: Sample) -> str:
        if not all_values:
            return f"of {len(ranked)}"
        below = sum(value < sample.values["ppo"] for value in all_values) / len(all_values)
        return f"of {len(ranked)} kept, above {100 * below:.0f} % of all {len(all_values)}"

    for name, at in (("Best", -1), ("Median", (len(ranked) - 1) // 2), ("Worst", 0)):
        ranked[at].heads.append(f"{name} {place(ranked[at])}")
    against = dict(ROWS)[start]
    changes = [(s.values["ppo"] - s.values[start], s) for s in ranked if start in s.values]
    change, lost = min(changes, key=lambda each: each[0], default=(0.0, ranked[0]))
    if change < 0:
        lost.heads.append(f"Lost most against {against}: {change:+.2f}")
        return ""
    return f"None of the {len(changes)} answers kept is worse than that of {against}." * bool(
        changes
    )


def _lost(ours: list[float], theirs: list[float], start: str) -> str:
    """On how many prompts PPO is better, equal and worse."""
    pairs = list(zip(ours, theirs, strict=True))
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return (
        f"Of all {len(pairs)} prompts, PPO's answer is better than that of {start} on {better}, "
        f"equal on {len(pairs) - better - worse} and worse on {worse}."
    )
