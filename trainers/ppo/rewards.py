"""Scores of answers: the terms of `ppo.rewards`, normalisation, penalties.

The KL penalty is in `ppo_math.shape_rewards`. Scores are identical on all ranks.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatllama.config.ppo import PpoSection
from chatllama.config.schema import Config
from chatllama.model.roles import Role
from trainers.functions.functions import RewardFunction
from trainers.functions.sample import Judge, Sample, judged
from trainers.ppo.ppo_math import ROUNDING
from trainers.ppo.terms.models import ClassifierModel
from trainers.ppo.terms.remote import ScoreServers


@dataclass(frozen=True)
class ScoreTerm:
    """One source of the score: the roles of a reward ensemble, or what scores texts."""

    name: str
    """In metrics."""
    weight: float
    roles: tuple[Role, ...] = ()
    judge: Judge | None = None


@dataclass(frozen=True)
class Statistics:
    """Count, mean and sum of squared deviations of raw scores (Welford; Chan's merge)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 while all scores are the same but for rounding."""
        return math.sqrt(self.squares / (self.count - 1)) if self.varies else 1.0

    @property
    def varies(self) -> bool:
        """Whether there are two scores that differ by more than rounding."""
        return self.squares > (self.count - 1) * (ROUNDING * self.mean) ** 2

    def merged(self, scores: Tensor) -> "Statistics":
        """Statistics with `scores` (N,) added."""
        numbers = scores.double()
        count, mean = self.count + len(numbers), float(numbers.mean())
        squares = float((numbers - mean).square().sum())
        shift = mean - self.mean
        return Statistics(
            count,
            self.mean + shift * len(numbers) / count,
            self.squares + squares + shift**2 * self.count * len(numbers) / count,
        )


class Scorer:
    """The raw score of an answer: the weighted sum of the terms of `ppo.rewards`.

    Args:
        members: roles of each adapter source, in the config's order.

    Raises:
        ValueError: a function cannot be imported, or a reward model not loaded.
    """

    def __init__(self, cfg: Config, members: Sequence[Sequence[Role]]) -> None:
        self.roles = [role for ensemble in members for role in ensemble]
        self.use_min = cfg.ppo.reward_ensemble == "min"
        self.terms: list[ScoreTerm] = []
        remaining = iter(members)
        for number, source in enumerate(cfg.ppo.rewards):
            key, name, weight = f"ppo.rewards.{number}", source.label, source.weight
            if source.adapter is not None:
                self.terms.append(ScoreTerm(name, weight, roles=tuple(next(remaining))))
            elif source.function is not None:
                self.terms.append(
                    ScoreTerm(name, weight, judge=RewardFunction(source, f"{key}.function"))
                )
            elif source.model is not None:
                model = ClassifierModel(source.model, f"{key}.model", cfg.ppo.microbatch_size)
                self.terms.append(ScoreTerm(name, weight, judge=model))
            else:
                self.terms.append(ScoreTerm(name, weight, judge=ScoreServers(source)))
        self.seconds = 0.0
        """Wall time of the terms that are no adapters, in the last batch."""

    def term_scores(self, member_scores: Tensor, samples: Sequence[Sample]) -> Tensor:
        """Scores of whole answers by each term, not weighted: (B, number of terms) float32.

        Args:
            member_scores: (B, M) float32, of `roles`.
            samples: the B answers of all ranks, which share the work.

        Raises:
            ValueError: a term has no score for an answer; names it, on every rank.
        """
        started, columns = time.monotonic(), list[Tensor]()
        for term in self.terms:
            if term.judge is not None:
                columns.append(torch.tensor(judged(term.judge, samples)).to(member_scores))
                continue
            members = member_scores[:, [self.roles.index(role) for role in term.roles]]
            columns.append(members.amin(1) if self.use_min else members.mean(1))
        self.seconds = time.monotonic() - started
        return torch.stack(columns, dim=1)

    def total(self, term_scores: Tensor) -> Tensor:
        """The weighted sum: (B,) float32."""
        total = torch.zeros(len(term_scores)).to(term_scores)
        for term, column in zip(self.terms, term_scores.unbind(1), strict=True):
            total = total + term.weight * column
        return total

    def metrics(self, term_scores: Tensor) -> dict[str, float]:
        """Mean of each term, and its share of the score's variation, where there are several.

        The share is the deviation of the weighted term over the sum of all terms' deviations.
        """
        found: dict[str, float] = {}
        if any(term.judge is not None for term in self.terms):
            found["ppo/reward_seconds"] = self.seconds
        if len(self.terms) == 1:
            return found
        weights = torch.tensor([term.weight for term in self.terms], dtype=torch.float64)
        spread = weights.abs() * term_scores.double().std(0, correction=0)
        shares = (spread / spread.sum().clamp(min=1e-12)).tolist()
        for term, mean, share in zip(self.terms, term_scores.mean(0).tolist(), shares, strict=True):
            found |= {f"ppo/term_mean/{term.name}": mean, f"ppo/term_share/{term.name}": share}
        return found

    def disagreement(self, member_scores: Tensor) -> Tensor | None:
        """Deviation among the members of the first ensemble: (B,); None without an ensemble."""
        for term in self.terms:
            if len(term.roles) > 1:
                columns = [self.roles.index(role) for role in term.roles]
                return member_scores[:, columns].std(1)
        return None


def shaped_scores(
    section: PpoSection, scores: Tensor, finished: Tensor, lengths: Tensor, statistics: Statistics
) -> Tensor:
    """Normalised and clipped scores less the penalties: (B,) float32.

    Args:
        scores: (B,) float32, raw.
        finished: (B,) bool, the response ends with a stop token.
        lengths: (B,) int64, tokens.
        statistics: of raw scores, from the reference's answers or from all so far.
    """
    if section.score_normalization != "none":
        scores = (scores - statistics.mean) / statistics.deviation
    if section.score_clip is not None:
        scores = scores.clamp(-section.score_clip, section.score_clip)
    if section.missing_eos == "penalty":
        scores = scores - section.missing_eos_penalty * (~finished).float()
    return scores - section.length_penalty * lengths.float()
