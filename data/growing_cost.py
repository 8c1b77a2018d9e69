"""What growing a data set will cost, told before it starts, and what it did cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.growing import JUDGE, NUM_ASKED, more_request
from data.growing_files import Harvest
from data.words import words

KEPT = 0.5
"""Share of the model's instructions taken to be new, for the estimate."""
_PER_WORD, _PER_CHARACTER = 1.4, 0.3  # tokens, rounded up: the endpoint's tokenizer is not known


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens; None where they were not given."""

    prompt: float | None
    completion: float | None

    def of(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Dollars, or None."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Estimate:
    """Bounds and guesses for a command."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    """At most: as many as may be asked for."""

    def lines(self, prices: Prices, per_minute: float | None) -> list[str]:
        """What the user is told before the first request."""
        told = [
            f"about {self.requests} requests, {self.prompt_tokens} tokens to the model, at most "
            f"{self.completion_tokens} tokens from it"
        ]
        dollars = prices.of(self.prompt_tokens, self.completion_tokens)
        if dollars is None:
            told.append("price unknown (--price-in, --price-out: dollars per million tokens)")
        else:
            told.append(f"at most about ${dollars:.2f}")
        if per_minute:
            told.append(f"at least {self.requests / per_minute:.0f} minutes at {per_minute:g}/min")
        return told


def estimate_prompts(seeds: Sequence[str], num: int, max_tokens: int) -> Estimate:
    """For `num` new instructions."""
    requests = -(-num // round(NUM_ASKED * KEPT))
    mean = sum(map(num_tokens, seeds)) / max(1, len(seeds))
    each = num_tokens(more_request([])) + NUM_ASKED * mean
    return Estimate(requests, round(requests * each), requests * max_tokens)


def estimate_answers(
    prompts: Sequence[Sequence[Mapping[str, str]]], max_tokens: int, *, pairs: bool
) -> Estimate:
    """For an answer to every conversation, or with `pairs` for two and their judgement."""
    asked = sum(num_tokens(turn["content"]) for prompt in prompts for turn in prompt)
    num = len(prompts)
    if not pairs:
        return Estimate(num, asked, num * max_tokens)
    judged = num_tokens(JUDGE) * num + asked + 2 * num * max_tokens
    return Estimate(4 * num, 2 * asked + 2 * judged, 4 * num * max_tokens)


def num_tokens(text: str) -> int:
    """A guess: the tokenizer is the endpoint's own."""
    return round(max(_PER_WORD * len(words(text)), _PER_CHARACTER * len(text)))


def closing_lines(harvest: Harvest, prices: Prices) -> list[str]:
    """What became of everything that was asked, over all runs, and what it cost."""
    outcomes = ", ".join(f"{count} {what}" for what, count in harvest.outcomes().most_common())
    totals: dict[str, Any] = {
        name: harvest.total(name) for name in ("requests", "prompt_tokens", "completion_tokens")
    }
    line = (
        f"{totals['requests']} requests, {totals['prompt_tokens']} tokens to the model, "
        f"{totals['completion_tokens']} from it"
    )
    dollars = prices.of(totals["prompt_tokens"], totals["completion_tokens"])
    if dollars is not None:
        line += f", ${dollars:.2f}"
    return [f"{harvest.out}: {len(harvest.results)} records ({outcomes})", line]
