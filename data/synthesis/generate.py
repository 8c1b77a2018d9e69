"""`chatllama data generate`: prompts, answers and preference pairs from a language model.

Three steps, each from the file of the one before: prompts in the manner of Self-Instruct (Wang
2022, arXiv 2212.10560), answers to them, and pairs of answers that a judge tells apart. Requests
go through `client.py`, files are in `ledger.py`, estimates in `command.py`.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chatllama.runtime.command_line import tell
from data.similarity import Pool, words
from data.synthesis.client import CUT, Endpoint, EndpointError, Reply, in_parallel
from data.synthesis.judging import JUDGE, shown, verdict
from data.synthesis.ledger import OutputFile
from data.synthesis.options import SynthesisOptions

Prompt = list[dict[str, str]]
"""A conversation that ends with the user."""
NUM_EXAMPLES = 8
"""Instructions shown with a request for more, as in Self-Instruct."""
NUM_REQUESTED = 8
"""Instructions requested at a time."""
SHORTEST, LONGEST = 3, 150
"""Words of an instruction, as in Self-Instruct."""
FRUITLESS = 10
"""Requests in a row without a new instruction, or failed prompts, after which the command ends."""
MORE_PROMPTS = """Here are {count} instructions that people gave to an assistant:

{examples}

Write {asked} more, as different as you can from these and from each other: in topic, in verb, in \
length, some with a question, some with a request. Each must make sense alone and be answerable in \
text. Number them from 1, one a line, and write nothing else."""
_NUMBERED = re.compile(r"^\s*(?:\d+[.):]|[-*])\s+(.*\S)", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """What one step gave."""

    records: list[dict[str, Any]]
    outcomes: Counter[str]
    """Candidates by what became of them; `kept` for those in `records`."""
    replies: list[Reply]

    def entry(self, **more: Any) -> dict[str, Any]:
        """The line of the ledger."""
        return {
            **more,
            "outcomes": dict(self.outcomes),
            "requests": len(self.replies),
            "prompt_tokens": sum(reply.prompt_tokens for reply in self.replies),
            "completion_tokens": sum(reply.completion_tokens for reply in self.replies),
        }


FAILED = Step([], Counter(["failed"]), [])
"""A bad reply, which was printed."""


@dataclass(frozen=True)
class Synthesis:
    """Generates the records of an output file.

    Every method raises EndpointError where the endpoint fails; the records so far stay.
    """

    options: SynthesisOptions
    output: OutputFile
    endpoint: Endpoint
    judge: Endpoint
    """Compares two answers."""

    def prompts(self, seeds: Sequence[str]) -> None:
        """Appends new instructions, beginning from the seeds, until there are `options.num`.

        Raises:
            EndpointError: also where the model repeats itself.
        """
        num, seed = self.options.num, self.options.seed
        assert num is not None
        own = [record["prompt"] for record in self.output.records]
        pool, fruitless = Pool(self.options.similarity, [*seeds, *own]), 0
        while len(own) < num:
            first = len(self.output.entries)
            count = min(self.options.parallel, -(-(num - len(own)) // NUM_REQUESTED))
            drawn = [_examples(seeds, own, f"{seed}/{i}") for i in range(first, first + count)]
            for examples, reply in in_parallel(self._more, drawn, self.options.parallel):
                step = FAILED if reply is None else _new_prompts(reply, pool, num - len(own))
                self.output.add(step.records, step.entry(examples=len(examples)))
                own += [record["prompt"] for record in step.records]
                fruitless = 0 if step.records or len(own) >= num else fruitless + 1
            tell(f"{len(own)} of {num} prompts")
            if fruitless >= FRUITLESS:
                raise EndpointError(
                    f"{fruitless} requests in a row gave no new instruction ({len(own)} of {num} "
                    "are there); give more seeds, a higher --temperature, or a higher --similarity"
                )

    def answers(self, prompts: Sequence[Prompt]) -> None:
        """Appends an answer to each conversation that has none yet.

        One that was cut at `max_tokens` is not kept, since it would teach to stop there, nor one
        that a content filter changed.
        """

        def answer(number: int) -> Step:
            reply = self._answer(prompts[number])
            outcome = reply.fault or "kept"
            record = {"id": number, "prompt": prompts[number], "completion": reply.text}
            return Step([record] if outcome == "kept" else [], Counter([outcome]), [reply])

        self._for_each(answer, len(prompts), "answers")

    def pairs(self, prompts: Sequence[Prompt]) -> None:
        """Appends, for each conversation, two answers of which the judge prefers one.

        The judge reads them in both orders, and must prefer the same one: many judges prefer
        whichever comes first (Wang 2023, arXiv 2305.17926).
        """

        def pair(number: int) -> Step:
            prompt = prompts[number]
            replies = [self._answer(prompt) for _ in range(2)]
            one, two = (reply.text for reply in replies)
            faults = filter(None, (reply.fault for reply in replies))
            fault = next(faults, "equal" if one == two else None)
            if fault is not None:
                return Step([], Counter([fault]), replies)
            request = shown(prompt)
            verdicts = []
            for first, second in ((one, two), (two, one)):
                replies.append(self._judge(JUDGE.format(request=request, one=first, two=second)))
                verdicts.append(verdict(replies[-1].text))
            outcome = "kept" if set(verdicts) == {"A", "B"} else "tied"
            if None in verdicts:
                outcome = "no verdict"
            better, worse = (one, two) if verdicts[0] == "A" else (two, one)
            record = {"id": number, "prompt": prompt, "chosen": better, "rejected": worse}
            return Step([record] if outcome == "kept" else [], Counter([outcome]), replies)

        self._for_each(pair, len(prompts), "pairs")

    def _for_each(self, make: Callable[[int], Step], num: int, name: str) -> None:
        done, failed_before = self.output.done(), self.output.failed()
        left, in_a_row = [number for number in range(num) if number not in done], 0
        left.sort(key=failed_before.__contains__)  # they come last
        steps = in_parallel(make, left, self.options.parallel)
        for count, (number, done_step) in enumerate(steps, start=1):
            step = done_step or FAILED
            failed = done_step is None  # without `id` it is tried again by the next run
            self.output.add(step.records, step.entry(**{"failed" if failed else "id": number}))
            in_a_row = in_a_row + 1 if failed else 0
            if in_a_row == FRUITLESS or (in_a_row == len(left) and not self.output.records):
                raise EndpointError(f"{in_a_row} prompts in a row failed, for the reasons above")
            if count % max(1, len(left) // 20) == 0 or count == len(left):
                total = f"{num - len(left) + count} of {num} prompts"
                tell(f"{total}: {len(self.output.records)} {name}")

    def _more(self, examples: Sequence[str]) -> Reply:
        return self._answer([{"role": "user", "content": request_for_more(examples)}])

    def _answer(self, prompt: Prompt) -> Reply:
        options = self.options
        return self.endpoint.chat(
            prompt, temperature=options.temperature, max_tokens=options.max_tokens
        )

    def _judge(self, request: str) -> Reply:
        prompt = [{"role": "user", "content": request}]
        return self.judge.chat(prompt, temperature=0.0, max_tokens=self.options.max_tokens)


def _examples(seeds: Sequence[str], own: Sequence[str], seed: str) -> list[str]:
    """Examples to show: three of four from the seeds, the others from what was made."""
    rng = random.Random(seed)
    fresh = rng.sample(list(own), min(len(own), NUM_EXAMPLES // 4))
    chosen = rng.sample(list(seeds), min(len(seeds), NUM_EXAMPLES - len(fresh))) + fresh
    rng.shuffle(chosen)
    return chosen


def request_for_more(examples: Sequence[str]) -> str:
    """The request for more instructions."""
    listed = "\n".join(f"{i}. {' '.join(each.split())}" for i, each in enumerate(examples, start=1))
    return MORE_PROMPTS.format(count=len(examples), examples=listed, asked=NUM_REQUESTED)


def _new_prompts(reply: Reply, pool: Pool, wanted: int) -> Step:
    """The instructions of a numbered list that are new; the last is left out where it was cut."""
    if reply.fault not in (None, "empty", CUT):
        return Step([], Counter([reply.fault]), [reply])
    listed: list[str] = _NUMBERED.findall(reply.text)
    if reply.fault == CUT:
        listed = listed[:-1]
    outcomes: Counter[str] = Counter()
    records: list[dict[str, Any]] = []
    for text in listed:
        if len(records) == wanted:
            outcomes["not needed"] += 1
        elif not SHORTEST <= len(words(text)) <= LONGEST:
            outcomes["too short or long"] += 1
        elif not pool.add(text):
            outcomes["similar"] += 1
        else:
            outcomes["kept"] += 1
            records.append({"prompt": text})
    if not listed:
        outcomes["no list"] += 1
    return Step(records, outcomes, [reply])
