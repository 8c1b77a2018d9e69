"""`chatllama data generate`: from the options to an output file, with its cost before and after.

The requests are in `generate.py`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast, get_args

import datasets

from chatllama.config.sources import DataSource, Format
from chatllama.runtime.command_line import tell
from chatllama.runtime.declared_options import check_limits
from chatllama.runtime.http_client import HttpClient
from data.reading.source import read_source
from data.similarity import words
from data.synthesis.client import Endpoint, EndpointError, Pace
from data.synthesis.generate import NUM_REQUESTED, Prompt, Synthesis, request_for_more
from data.synthesis.judging import JUDGE
from data.synthesis.ledger import OutputFile
from data.synthesis.options import EndpointOptions, SynthesisOptions

TIMEOUT = 300.0
"""Seconds for an answer of the endpoint."""
KEPT = 0.5
"""Share of the model's instructions expected to be new, for the estimate."""
_PER_WORD, _PER_CHARACTER = 1.4, 0.3  # tokens, rounded up: the endpoint's tokenizer is unknown


def generate_data(options: SynthesisOptions) -> None:
    """Generates into the output file, after printing the cost.

    Raises:
        ValueError: an option out of range, unreadable prompts, no consent, or the endpoint fails.
    """
    _check(options)
    datasets.disable_progress_bars()
    source = DataSource(path=options.file, format=cast(Format | None, options.format))
    data, report = read_source(source, "prompts")
    tell(report.summary())
    prompts: list[Prompt] = data["messages"][:]
    if options.what != "prompts":
        prompts = prompts[: options.num]
    output = OutputFile(options.out, _settings(options, prompts))
    seeds = [prompt[-1]["content"] for prompt in prompts]
    if options.what == "prompts":
        left = max(0, cast(int, options.num) - len(output.records))
        estimate = estimate_prompts(seeds, left, options.max_tokens)
    else:
        done = output.done()
        todo = [prompt for number, prompt in enumerate(prompts) if number not in done]
        left = len(todo)
        estimate = estimate_answers(todo, options.max_tokens, pairs=options.what == "pairs")
    if output.entries:
        tell(f"{options.out}: continuing after {len(output.records)} records; {left} to do")
    if left:
        tell("\n".join(estimate.lines(options)))
        ask_consent(options.yes)
        try:
            _generate(options, output, prompts, seeds)
        except (EndpointError, KeyboardInterrupt):
            tell("\n".join(closing_lines(output, options)))
            tell("the same command continues from here")
            raise
    tell("\n".join(closing_lines(output, options)))
    if options.what != "prompts" and (failed := len(prompts) - len(output.done())):
        tell(f"{failed} prompts failed, and the same command tries them again")


def _generate(
    options: SynthesisOptions, output: OutputFile, prompts: list[Prompt], seeds: list[str]
) -> None:
    http = open_api(options.url, options)
    judge = Endpoint(http, options.judge_model or options.model)
    synthesis = Synthesis(options, output, Endpoint(http, options.model), judge)
    match options.what:
        case "prompts":
            synthesis.prompts(seeds)
        case "answers":
            synthesis.answers(prompts)
        case "pairs":
            synthesis.pairs(prompts)


def open_api(url: str, options: EndpointOptions) -> HttpClient:
    """The client of an endpoint, with the key of the environment and the pace of the options."""
    return HttpClient(
        url,
        os.environ.get(options.key_env),
        TIMEOUT,
        proxies=True,
        retries=options.retries,
        wait=Pace(options.per_minute).wait,
    )


def _settings(options: SynthesisOptions, prompts: list[Prompt]) -> dict[str, object]:
    """What determines the records; the other options may differ when a file is continued."""
    settings: dict[str, object] = {
        "what": options.what,
        "model": options.model,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }
    if options.what == "prompts":
        settings |= {"seed": options.seed, "similarity": options.similarity}
    if options.what == "pairs":
        settings["judge_model"] = options.judge_model or options.model
    return settings


def _check(options: SynthesisOptions) -> None:
    """Raises ValueError for an option out of range."""
    check_limits(options)
    if options.format is not None and options.format not in get_args(Format):
        raise ValueError(f"--format {options.format}: known are {', '.join(get_args(Format))}")
    if options.what == "prompts" and options.num is None:
        raise ValueError("--num: say how many prompts to make")
    if options.what == "pairs" and options.temperature == 0:
        raise ValueError("--temperature 0 would give pairs of equal answers")
    if options.out.suffix != ".jsonl":
        raise ValueError(f"--out {options.out}: the file is JSON lines, so name it .jsonl")


def ask_consent(yes: bool) -> None:
    """Raises ValueError if the user does not agree, or cannot be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("standard input is not a terminal, so nobody can agree; give --yes")
    if input("go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not agreed, no request was sent")


class Estimate(NamedTuple):
    """Bounds and guesses for a command."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    """At most: as many as may be requested."""

    def lines(self, options: EndpointOptions) -> list[str]:
        """What is printed before the first request."""
        lines = [
            f"about {self.requests} requests, {self.prompt_tokens} tokens to the model, at most "
            f"{self.completion_tokens} tokens from it"
        ]
        dollars = options.dollars(self.prompt_tokens, self.completion_tokens)
        if dollars is None:
            lines.append("price unknown (--price-in, --price-out: dollars per million tokens)")
        else:
            lines.append(f"at most about ${dollars:.2f}")
        if rate := options.per_minute:
            lines.append(f"at least {self.requests / rate:.0f} minutes at {rate:g}/min")
        return lines


def estimate_prompts(seeds: Sequence[str], num: int, max_tokens: int) -> Estimate:
    """For `num` new instructions."""
    requests = -(-num // round(NUM_REQUESTED * KEPT))
    mean = sum(map(num_tokens, seeds)) / max(1, len(seeds))
    each = num_tokens(request_for_more([])) + NUM_REQUESTED * mean
    return Estimate(requests, round(requests * each), requests * max_tokens)


def estimate_answers(
    prompts: Sequence[Sequence[Mapping[str, str]]], max_tokens: int, *, pairs: bool
) -> Estimate:
    """For an answer to every conversation, or with `pairs` for two and their judgement."""
    sent = sum(num_tokens(turn["content"]) for prompt in prompts for turn in prompt)
    num = len(prompts)
    if not pairs:
        return Estimate(num, sent, num * max_tokens)
    judged = num_tokens(JUDGE) * num + sent + 2 * num * max_tokens
    return Estimate(4 * num, 2 * sent + 2 * judged, 4 * num * max_tokens)


def num_tokens(text: str) -> int:
    """A guess: the tokenizer is the endpoint's own."""
    return round(max(_PER_WORD * len(words(text)), _PER_CHARACTER * len(text)))


def closing_lines(output: OutputFile, options: SynthesisOptions) -> list[str]:
    """The records by outcome, over all runs, and what they cost."""
    outcomes = ", ".join(f"{count} {what}" for what, count in output.outcomes().most_common())
    sent, received = output.total("prompt_tokens"), output.total("completion_tokens")
    cost = cost_line(output.total("requests"), sent, received, options)
    return [f"{output.path}: {len(output.records)} records ({outcomes})", cost]


def cost_line(requests: int, sent: int, received: int, options: EndpointOptions) -> str:
    """What was paid: `sent` and `received` are tokens to the model and from it."""
    dollars = options.dollars(sent, received)
    price = "" if dollars is None else f", ${dollars:.2f}"
    return f"{requests} requests, {sent} tokens to the model, {received} from it{price}"
