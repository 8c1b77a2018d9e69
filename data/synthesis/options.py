"""The options of `data generate`, each with its limit, and what tokens cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatllama.runtime.declared_options import ABOVE_0, Limit, at_least, option


def _between(least: float, most: float) -> Limit:
    text = f"must be at least {least} and at most {most}"
    return Limit(text, lambda value: least <= value <= most)


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Pace, patience and price of an endpoint."""

    parallel: int = option(4, "requests at a time", limit=_between(1, 256), metavar="N")
    per_minute: float | None = option(None, "requests a minute at most", limit=ABOVE_0, metavar="N")
    retries: int = option(6, "tries after 429, 5xx, no answer", limit=_between(0, 100), metavar="N")
    price_in: float | None = option(
        None, "for a million tokens to the model", limit=at_least(0), metavar="USD"
    )
    price_out: float | None = option(
        None, "for a million tokens from it", limit=at_least(0), metavar="USD"
    )
    key_env: str = option(
        "OPENAI_API_KEY", "environment variable with the API's key, if it needs one", metavar="NAME"
    )
    yes: bool = option(False, "do not ask before the first request")

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Price of so many tokens; None where the prices were not given."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions(EndpointOptions):
    """What to generate from which file, with which model."""

    what: Literal["prompts", "answers", "pairs"]
    file: str
    """Seeds, or prompts to answer, in any format that gives prompts."""
    out: Path
    url: str
    model: str
    format: str | None = option(None, "of FILE (default: detected from its keys)", metavar="NAME")
    judge_model: str | None = option(None, "compares pairs (default: --model)", metavar="NAME")
    num: int | None = option(
        None, "prompts to make; or answer the first N only", limit=at_least(1), metavar="N"
    )
    temperature: float = option(1.0, "of sampling", limit=at_least(0), metavar="T")
    max_tokens: int = option(1024, "of an answer", limit=at_least(1), metavar="N")
    similarity: float = option(
        0.7, "ROUGE-L from which a prompt is not new", limit=_between(0.05, 1), metavar="S"
    )
    seed: int = option(0, "of the choice of examples")
