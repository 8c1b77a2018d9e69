"""`chatllama data generate`: from the words of the command line to a grown file."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import datasets

from chatllama.config import DataSource, Format
from data.endpoint import Endpoint, EndpointError, Pace
from data.growing import Writing, grow_answers, grow_pairs, grow_prompts
from data.growing_cost import Prices, closing_lines, estimate_answers, estimate_prompts
from data.growing_files import Harvest
from data.readers import read_source


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
    harvest = Harvest(wanted.out, _settings(wanted, prompts))
    seeds = [prompt[-1]["content"] for prompt in prompts]
    if wanted.what == "prompts":
        assert wanted.num is not None
        left = max(0, wanted.num - len(harvest.results))
        estimate = estimate_prompts(seeds, left, wanted.max_tokens)
    else:
        done = harvest.done()
        todo = [prompt for number, prompt in enumerate(prompts) if number not in done]
        left = len(todo)
        estimate = estimate_answers(todo, wanted.max_tokens, pairs=wanted.what == "pairs")
    if harvest.entries:
        told(f"{wanted.out}: going on with {len(harvest.results)} records; {left} to do")
    if left:
        told("\n".join(estimate.lines(wanted.prices, wanted.per_minute)))
        _ask_consent(wanted.yes)
        try:
            _grow(wanted, prompts, seeds, harvest, told)
        except (EndpointError, KeyboardInterrupt):
            told("\n".join(closing_lines(harvest, wanted.prices)))
            told("the same command goes on from here")
            raise
    told("\n".join(closing_lines(harvest, wanted.prices)))


def _grow(
    wanted: Wanted,
    prompts: list[list[dict[str, str]]],
    seeds: list[str],
    harvest: Harvest,
    told: Callable[[str], None],
) -> None:
    key = os.environ.get(wanted.key_env)
    pace = Pace(wanted.per_minute)
    endpoint = Endpoint(wanted.url, wanted.model, key, pace, wanted.retries)
    writing = Writing(
        endpoint,
        replace(endpoint, model=wanted.judge_model or wanted.model),
        temperature=wanted.temperature,
        max_tokens=wanted.max_tokens,
        parallel=wanted.parallel,
        seed=wanted.seed,
        similarity=wanted.similarity,
        told=told,
    )
    match wanted.what:
        case "prompts":
            grow_prompts(writing, seeds, cast(int, wanted.num), harvest)
        case "answers":
            grow_answers(writing, prompts, harvest)
        case "pairs":
            grow_pairs(writing, prompts, harvest)


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
