"""What the checks look back at, and what they return; the checks themselves are in `checks.py`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from chatllama.config.ppo import HealthSection

LONGEST = 22
"""Steps that the check with the longest memory looks back at."""
Metrics = Mapping[str, float]


class TooFewSteps(Exception):
    """A check needs more steps than there have been."""


@dataclass
class History:
    """The metrics that the checks look back at: of the first steps and of the last ones."""

    first: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> values of the first `baseline_steps` steps."""
    last: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> last values, the newest at the end."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation with the highest gold score before the last one."""
    steps: int = 0
    """Steps done, the checked one included."""

    def add(self, name: str, value: float, section: HealthSection) -> None:
        """Appends a finite value and drops those that no check needs any more."""
        first = self.first.setdefault(name, [])
        if len(first) < section.baseline_steps:
            first.append(value)
        kept = max(section.window, LONGEST)
        self.last[name] = [*self.last.get(name, []), value][-kept:]

    def recent(self, name: str, count: int) -> list[float]:
        """The last `count` values; raises TooFewSteps while there are fewer."""
        values = self.last.get(name, [])
        if len(values) < count:
            raise TooFewSteps
        return values[-count:]

    def change(self, name: str, section: HealthSection) -> tuple[float, float]:
        """Mean over the first steps and over the last window, which must not overlap."""
        if self.steps < section.baseline_steps + section.window:
            raise TooFewSteps
        last = self.recent(name, section.window)
        return fmean(self.first[name]), fmean(last)


@dataclass(frozen=True)
class Finding:
    """What a check found wrong."""

    figure: float
    threshold: float
    meaning: str


def error_of_mean(errors: list[float]) -> float:
    """Standard error of the mean of independent numbers with the given standard errors."""
    return math.sqrt(math.fsum(e * e for e in errors)) / len(errors)
