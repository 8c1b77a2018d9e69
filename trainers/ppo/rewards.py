"""Scores of answers: reward adapters and functions, normalisation, penalties.

The KL penalty is in `ppo_math.shape_rewards`. Scores are identical on all ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatllama.config.base import load_function
from chatllama.config.ppo import PpoSection
from chatllama.config.schema import Config
from chatllama.model.roles import Role
from chatllama.runtime.distributed import all_gather_objects, rank, world_size
from trainers.ppo.ppo_math import ROUNDING


@dataclass(frozen=True)
class ScoreTerm:
    """One source of the score: the roles of a reward ensemble, or a function."""

    weight: float
    roles: tuple[Role, ...] = ()
    function: Callable[[str, str], float] | None = None


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
    """The raw score of an answer: reward adapters and functions, weighted and added.

    Args:
        members: roles of each adapter source, in the config's order.

    Raises:
        ValueError: a function cannot be imported.
    """

    def __init__(self, cfg: Config, members: Sequence[Sequence[Role]]) -> None:
        self.roles = [role for ensemble in members for role in ensemble]
        self.use_min = cfg.ppo.reward_ensemble == "min"
        self.terms: list[ScoreTerm] = []
        remaining = iter(members)
        for number, source in enumerate(cfg.ppo.rewards):
            if source.function is None:
                self.terms.append(ScoreTerm(source.weight, roles=tuple(next(remaining))))
            else:
                function = load_function(source.function, f"ppo.rewards.{number}.function")
                self.terms.append(ScoreTerm(source.weight, function=function))

    def total(
        self, member_scores: Tensor, prompts: Sequence[str], responses: Sequence[str]
    ) -> Tensor:
        """Scores of whole answers: (B,) float32.

        Args:
            member_scores: (B, M) float32, of `roles`.

        Raises:
            ValueError: a function returned no finite number; names the answer.
        """
        total = self._functions(prompts, responses).to(member_scores)
        for term in self.terms:
            if term.roles:
                columns = member_scores[:, [self.roles.index(role) for role in term.roles]]
                combined = columns.amin(1) if self.use_min else columns.mean(1)
                total = total + term.weight * combined
        return total

    def disagreement(self, member_scores: Tensor) -> Tensor | None:
        """Deviation among the members of the first ensemble: (B,); None without an ensemble."""
        for term in self.terms:
            if len(term.roles) > 1:
                columns = [self.roles.index(role) for role in term.roles]
                return member_scores[:, columns].std(1)
        return None

    def _functions(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Weighted sum of the functions' values (B,); each rank calls them for its part."""
        total = [0.0] * len(prompts)
        functions = [(t.weight, t.function) for t in self.terms if t.function is not None]
        if not functions:
            return torch.tensor(total)
        for i in range(rank(), len(prompts), world_size()):
            for weight, function in functions:
                value = function(prompts[i], responses[i])
                if not _is_finite(value):
                    raise ValueError(
                        f"reward function {function.__name__} gave {value!r} for prompt "
                        f"{prompts[i]!r} and response {responses[i]!r}"
                    )
                total[i] += weight * float(value)
        return torch.tensor([sum(parts) for parts in zip(*all_gather_objects(total), strict=True)])


def _is_finite(value: object) -> bool:
    """Whether it is a number (also of NumPy or torch), neither NaN nor infinite."""
    try:
        return math.isfinite(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        return False


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
