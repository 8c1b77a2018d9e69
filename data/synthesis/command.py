"""`chatllama data generate`: from the words of the command line to a grown file and its cost."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import datasets

from chatllama.config.sources import DataSource, Format
from chatllama.runtime.http_client import HttpClient
from data.reading.source import read_source
from data.similarity import words
from data.synthesis.client import Endpoint, EndpointError, Pace
from data.synthesis.generate import (
    JUDGE,
    NUM_ASKED,
    Writing,
    grow_answers,
    grow_pairs,
    grow_prompts,
    more_request,
)
from data.synthesis.ledger import OutputFile

TIMEOUT = 300.0
"""Seconds for an answer of the endpoint."""
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
class Wanted:
    """What the command line asks for."""

    what: Literal["prompts", "answers", "pairs"]
    out: Path
    file: str
    """Seeds, or prompts to answer, in any format that gives prompts."""
    format: Format | None
    url: str
    model: str
    judge_model: str | None
    num: int | None
    temperature: float
    max_tokens: int
    parallel: int
    per_minute: float | None
    retries: int
    similarity: float
    seed: int
    prices: Prices
    key_env: str
    yes: bool


def generate_data(wanted: Wanted, told: Callable[[str], None] = print) -> None:
    """Grows the file that the command line asks for, after saying what it will cost.

    Raises:
        ValueError: an option out of range, unreadable prompts, no consent, or the endpoint fails.
    """
    _check(wanted)
    datasets.disable_progress_bars()
    source = DataSource(path=wanted.file, format=wanted.format)
    data, report = read_source(source, "prompts")
    told(report.summary())
    prompts: list[list[dict[str, str]]] = data["messages"][:]
    if wanted.what != "prompts":
        prompts = prompts[: wanted.num]
    output = OutputFile(wanted.out, _settings(wanted, prompts))
    seeds = [prompt[-1]["content"] for prompt in prompts]
    if wanted.what == "prompts":
        assert wanted.num is not None
        left = max(0, wanted.num - len(output.records))
        estimate = estimate_prompts(seeds, left, wanted.max_tokens)
    else:
        done = output.done()
        todo = [prompt for number, prompt in enumerate(prompts) if number not in done]
        left = len(todo)
        estimate = estimate_answers(todo, wanted.max_tokens, pairs=wanted.what == "pairs")
    if output.entries:
        told(f"{wanted.out}: going on with {len(output.records)} records; {left} to do")
    if left:
        told("\n".join(estimate.lines(wanted.prices, wanted.per_minute)))
        _ask_consent(wanted.yes)
        try:
            _grow(wanted, prompts, seeds, output, told)
        except (EndpointError, KeyboardInterrupt):
            told("\n".join(closing_lines(output, wanted.prices)))
            told("the same command goes on from here")
            raise
    told("\n".join(closing_lines(output, wanted.prices)))


def _grow(
    wanted: Wanted,
    prompts: list[list[dict[str, str]]],
    seeds: list[str],
    output: OutputFile,
    told: Callable[[str], None],
) -> None:
    http = HttpClient(
        wanted.url,
        os.environ.get(wanted.key_env),
        TIMEOUT,
        proxies=True,
        retries=wanted.retries,
        wait=Pace(wanted.per_minute).wait,
    )
    writing = Writing(
        Endpoint(http, wanted.model),
        Endpoint(http, wanted.judge_model or wanted.model),
        temperature=wanted.temperature,
        max_tokens=wanted.max_tokens,
        parallel=wanted.parallel,
        seed=wanted.seed,
        similarity=wanted.similarity,
        told=told,
    )
    match wanted.what:
        case "prompts":
            grow_prompts(writing, seeds, cast(int, wanted.num), output)
        case "answers":
            grow_answers(writing, prompts, output)
        case "pairs":
            grow_pairs(writing, prompts, output)


def _settings(wanted: Wanted, prompts: list[list[dict[str, str]]]) -> dict[str, object]:
    """What decides the records; the rest may differ when a file is gone on with."""
    settings: dict[str, object] = {
        "what": wanted.what,
        "model": wanted.model,
        "temperature": wanted.temperature,
        "max_tokens": wanted.max_tokens,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }
    if wanted.what == "prompts":
        settings |= {"seed": wanted.seed, "similarity": wanted.similarity}
    if wanted.what == "pairs":
        settings["judge_model"] = wanted.judge_model or wanted.model
    return settings


def _check(wanted: Wanted) -> None:
    for name, value, low, high in (
        ("--num", wanted.num, 1, None),
        ("--temperature", wanted.temperature, 0, None),
        ("--max-tokens", wanted.max_tokens, 1, None),
        ("--parallel", wanted.parallel, 1, 256),
        ("--retries", wanted.retries, 0, 100),
        ("--similarity", wanted.similarity, 0.05, 1),
        ("--price-in", wanted.prices.prompt, 0, None),
        ("--price-out", wanted.prices.completion, 0, None),
    ):
        if value is not None and not low <= value <= (float("inf") if high is None else high):
            upper = "" if high is None else f" and at most {high}"
            raise ValueError(f"{name} {value}: must be at least {low}{upper}")
    if wanted.format is not None and wanted.format not in get_args(Format):
        raise ValueError(f"--format {wanted.format}: known are {', '.join(get_args(Format))}")
    if wanted.per_minute is not None and wanted.per_minute <= 0:
        raise ValueError(f"--per-minute {wanted.per_minute}: must be above 0")
    if wanted.what == "prompts" and wanted.num is None:
        raise ValueError("--num: say how many prompts to make")
    if wanted.what == "pairs" and wanted.temperature == 0:
        raise ValueError("--temperature 0 would give pairs of equal answers")
    if wanted.out.suffix != ".jsonl":
        raise ValueError(f"--out {wanted.out}: the file is JSON lines, so name it .jsonl")


def _ask_consent(yes: bool) -> None:
    """Nothing, if the user agrees.

    Raises:
        ValueError: they do not, or cannot be asked.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("nobody is there to agree to this; give --yes")
    if input("go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not agreed, nothing was asked")


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


def closing_lines(output: OutputFile, prices: Prices) -> list[str]:
    """What became of everything that was asked, over all runs, and what it cost."""
    outcomes = ", ".join(f"{count} {what}" for what, count in output.outcomes().most_common())
    totals: dict[str, Any] = {
        name: output.total(name) for name in ("requests", "prompt_tokens", "completion_tokens")
    }
    line = (
        f"{totals['requests']} requests, {totals['prompt_tokens']} tokens to the model, "
        f"{totals['completion_tokens']} from it"
    )
    dollars = prices.of(totals["prompt_tokens"], totals["completion_tokens"])
    if dollars is not None:
        line += f", ${dollars:.2f}"
    return [f"{output.path}: {len(output.records)} records ({outcomes})", line]
