"""Judges that give numbers or are people: a reward model, a gold function, votes of the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

from chatllama.config.ppo import RewardSource
from chatllama.inference.options import WeightsOptions
from chatllama.reporting.statistics import mean_and_error
from chatllama.runtime.json_files import MORE_KEYS
from chatllama.runtime.jsonl import read_lines
from trainers.functions.functions import RewardFunction
from trainers.functions.sample import Sample
from trainers.judging.reward_model import open_reward_model
from trainers.judging.sides import Comparison, sample_of


@dataclass(frozen=True)
class Judgement:
    """What a judge found; lists are aligned with the comparisons."""

    by: str
    """The judge, in words."""
    outcomes: list[float | None]
    """1: the second answer is better, 0: the first, 0.5: neither; None: left out."""
    orders: list[tuple[float, float] | None] | None = None
    """For judges that saw both orders; see `win_rate.position_bias`."""
    details: list[dict[str, Any]] = field(default_factory=list)
    """For each comparison, what its line in comparisons.jsonl says of it."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """For the result."""


def by_reward(
    comparisons: Sequence[Comparison], place: str, options: WeightsOptions, batch_size: int | None
) -> Judgement:
    """The answer with the higher score of a reward model; what is too long for it is left out."""
    model = open_reward_model(place, options, batch_size)
    scores = model.scores(_all_samples(comparisons))
    return _by_scores(f"reward model {place}", scores)


def gold_judge(name: str) -> RewardFunction:
    """The function of that name; ValueError if there is none."""
    return RewardFunction(RewardSource(function=name), "--gold")


def by_gold(comparisons: Sequence[Comparison], name: str) -> Judgement:
    """The answer for which a function gives more."""
    return _by_scores(f"gold {name}", gold_judge(name).values(_all_samples(comparisons)))


def _all_samples(comparisons: Sequence[Comparison]) -> list[Sample]:
    return [sample for each in comparisons for sample in (each.first, each.second)]


def _by_scores(by: str, scores: Sequence[float | None]) -> Judgement:
    outcomes: list[float | None] = []
    pairs = list(zip(scores[::2], scores[1::2], strict=True))
    for first, second in pairs:
        if first is None or second is None:
            outcomes.append(None)
        else:
            outcomes.append(0.5 + 0.5 * ((second > first) - (second < first)))
    kept = [(one, other) for one, other in pairs if one is not None and other is not None]
    numbers: dict[str, Any] = {}
    if kept:
        numbers["scores"] = {
            name: dict(zip(("mean", "se"), mean_and_error(values), strict=True))
            for name, values in {
                "first": [one for one, _ in kept],
                "second": [other for _, other in kept],
                "difference": [other - one for one, other in kept],
            }.items()
        }
    details: list[dict[str, Any]] = [{"first_score": a, "second_score": b} for a, b in pairs]
    return Judgement(by, outcomes, details=details, numbers=numbers)


class _Vote(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    prompt: Required[list[dict[str, str]]]
    answers: list[str]
    models: list[str]
    verdict: Literal["a", "b", "tie", "both_bad"]


_VOTE = TypeAdapter(_Vote)


def by_votes(file: Path, first: str, second: str) -> tuple[list[Comparison], Judgement]:
    """The votes between two models in a file of the page, and the comparisons that they are.

    `both_bad` is a tie. The page shows two models on sides that change, so one order each is seen.

    Raises:
        ValueError: no such file, a line that is no vote, or no vote between the two.
    """
    if not file.is_file():
        raise ValueError(f"--votes {file}: no such file")
    comparisons: list[Comparison] = []
    outcomes: list[float | None] = []
    shown_first: list[float] = []
    seen: set[str] = set()
    for number, line in enumerate(read_lines(file), start=1):
        try:
            vote = _VOTE.validate_python(line)
        except ValidationError:
            raise ValueError(f"{file}:{number}: this is no vote of `chatllama serve`") from None
        seen.update(vote["models"])
        if sorted(vote["models"]) != sorted((first, second)):
            continue
        answers = dict(zip(vote["models"], vote["answers"], strict=True))
        messages: list[Any] = vote["prompt"]
        one, other = (sample_of(messages, answers[name], str(file)) for name in (first, second))
        comparisons.append(Comparison(one, other, 1, None))
        decided = vote["verdict"] in ("a", "b")
        outcomes.append(float(vote["models"][0] == second) if decided else 0.5)
        if decided:
            shown_first.append(float(vote["verdict"] == "a"))
    if not comparisons:
        there = ", ".join(sorted(seen)) or "no votes"
        raise ValueError(f"--votes {file}: no vote between {first} and {second}; there: {there}")
    numbers: dict[str, Any] = {"left_side_wins": None}
    if shown_first:
        mean, error = mean_and_error(shown_first)
        numbers["left_side_wins"] = {"value": mean, "se": error, "decided": len(shown_first)}
    return comparisons, Judgement(f"votes {file}", outcomes, numbers=numbers)
