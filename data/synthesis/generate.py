"""`chatllama data generate`: prompts, answers and preference pairs from a language model.

Three steps, each from the file of the one before: prompts in the manner of Self-Instruct (Wang
2022, arXiv 2212.10560), answers to them, and pairs of answers that a judge tells apart. Requests
go through `endpoint.py`, files are in `growing_files.py`, estimates in `growing_command.py`.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from data.similarity import Pool, words
from data.synthesis.client import Endpoint, EndpointError, Reply
from data.synthesis.ledger import OutputFile

NUM_EXAMPLES = 8
"""Instructions shown with a request for more, as in Self-Instruct."""
NUM_ASKED = 8
"""Instructions asked for at a time."""
SHORTEST, LONGEST = 3, 150
"""Words of an instruction, as in Self-Instruct."""
FRUITLESS = 10
"""Requests in a row without a new instruction after which the pool is taken to be exhausted."""
MORE_PROMPTS = """Here are {count} instructions that people gave to an assistant:

{examples}

Write {asked} more, as different as you can from these and from each other: in topic, in verb, in \
length, some with a question, some with a request. Each must make sense alone and be answerable in \
text. Number them from 1, one a line, and write nothing else."""
JUDGE = """Two answers to the same request are shown. Which one would the person who asked rather \
have? Judge whether it is correct, helpful, harmless and to the point; length alone is no merit.

[Request]
{request}

[Answer A]
{one}

[Answer B]
{two}

Reply with one letter: A, B, or C if neither is better."""
_NUMBERED = re.compile(r"^\s*(?:\d+[.):]|[-*])\s+(.*\S)", re.MULTILINE)
_VERDICT = re.compile(r"(?<![A-Za-z])([ABC])(?![A-Za-z])")


@dataclass(frozen=True)
class Step:
    """What one step gave."""

    results: list[dict[str, Any]]
    outcomes: Counter[str]
    """Candidates by what became of them; `kept` for those in `results`."""
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


@dataclass(frozen=True)
class Writing:
    """How the model is asked."""

    endpoint: Endpoint
    judge: Endpoint
    """Who compares two answers."""
    temperature: float
    max_tokens: int
    parallel: int
    """Requests under way at a time."""
    seed: int
    similarity: float = 0.7
    """ROUGE-L to any other from which an instruction is not new."""
    told: Callable[[str], None] = field(default=print)
    """Receives lines of progress."""


def grow_prompts(writing: Writing, seeds: Sequence[str], num: int, output: OutputFile) -> None:
    """Appends new instructions until `output` has `num`.

    Args:
        writing: how to ask.
        seeds: instructions to begin with.
        num: how many to have in the end.
        output: receives records of format `prompts`.

    Raises:
        EndpointError: the endpoint fails, or has nothing new to say; what was kept stays.
    """
    own = [line["prompt"] for line in output.records]
    pool, fruitless = Pool(writing.similarity, [*seeds, *own]), 0
    while len(own) < num:
        number = len(output.entries)
        batch = range(number, number + min(writing.parallel, -(-(num - len(own)) // NUM_ASKED)))
        shown = [_examples(seeds, own, f"{writing.seed}/{each}") for each in batch]
        for examples, reply in _answered(shown, writing.parallel, lambda e: _more(writing, e)):
            step = _new_prompts(reply, pool, num - len(own))
            output.add(step.results, step.entry(examples=len(examples)))
            own += [result["prompt"] for result in step.results]
            fruitless = 0 if step.results or len(own) >= num else fruitless + 1
        writing.told(f"{len(own)} of {num} prompts")
        if fruitless >= FRUITLESS:
            raise EndpointError(
                f"{fruitless} requests in a row gave no new instruction ({len(own)} of {num} are "
                "there); give more seeds, a higher --temperature, or a higher --similarity"
            )


def grow_answers(
    writing: Writing, prompts: Sequence[list[dict[str, str]]], output: OutputFile
) -> None:
    """Appends an answer to each conversation that has none yet.

    An answer that was cut at `max_tokens` is not kept: it would teach to stop there.

    Args:
        writing: how to ask.
        prompts: conversations that end with the user.
        output: receives records of format `prompt_completion`.

    Raises:
        EndpointError: the endpoint fails; what was kept stays.
    """

    def work(number: int) -> Step:
        reply = _answer(writing, prompts[number])
        outcome = _fault(reply) or "kept"
        record = {"id": number, "prompt": prompts[number], "completion": reply.text}
        return Step([record] if outcome == "kept" else [], Counter([outcome]), [reply])

    _for_each(work, writing, len(prompts), output, "answers")


def grow_pairs(
    writing: Writing, prompts: Sequence[list[dict[str, str]]], output: OutputFile
) -> None:
    """Appends, for each conversation, two answers of which the judge prefers one.

    The judge sees them in both orders, and must prefer the same one: many judges like whichever
    comes first (Wang 2023, arXiv 2305.17926).

    Args:
        writing: how to ask.
        prompts: conversations that end with the user.
        output: receives records of format `preference`.

    Raises:
        EndpointError: the endpoint fails; what was kept stays.
    """

    def work(number: int) -> Step:
        replies = [_answer(writing, prompts[number]) for _ in range(2)]
        fault = next(filter(None, map(_fault, replies)), None)
        one, two = (reply.text for reply in replies)
        if fault is None and one == two:
            fault = "equal"
        if fault is not None:
            return Step([], Counter([fault]), replies)
        request = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompts[number])
        if len(prompts[number]) == 1:
            request = prompts[number][0]["content"]
        verdicts = []
        for first, second in ((one, two), (two, one)):
            asked = JUDGE.format(request=request, one=first, two=second)
            replies.append(_judge(writing, asked))
            verdicts.append(_verdict(replies[-1].text))
        outcome = {("A", "B"): "kept", ("B", "A"): "kept"}.get((verdicts[0], verdicts[1]), "tied")
        if None in verdicts:
            outcome = "no verdict"
        better, worse = (one, two) if verdicts[0] == "A" else (two, one)
        record = {"id": number, "prompt": prompts[number], "chosen": better, "rejected": worse}
        return Step([record] if outcome == "kept" else [], Counter([outcome]), replies)

    _for_each(work, writing, len(prompts), output, "pairs")


def _for_each(
    work: Callable[[int], Step], writing: Writing, num: int, output: OutputFile, name: str
) -> None:
    done = output.done()
    left = [number for number in range(num) if number not in done]
    for count, (number, step) in enumerate(_answered(left, writing.parallel, work), start=1):
        output.add(step.results, step.entry(id=number))
        if count % max(1, len(left) // 20) == 0 or count == len(left):
            total = f"{num - len(left) + count} of {num} prompts"
            writing.told(f"{total}: {len(output.records)} {name}")


def _answered(items: Iterable[Any], parallel: int, work: Callable[[Any], Any]) -> Iterator[Any]:
    """Pairs of item and what `work` made of it, as they come.

    Raises:
        EndpointError: of the first that failed, after those that were under way.
    """
    with ThreadPoolExecutor(parallel) as pool:
        running: dict[Future[Any], Any] = {}
        failed: EndpointError | None = None
        waiting = iter(items)
        while True:
            while failed is None and len(running) < parallel:
                try:
                    item = next(waiting)
                except StopIteration:
                    break
                running[pool.submit(work, item)] = item
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                try:
                    result = future.result()
                except EndpointError as error:
                    failed = failed or error
                    continue
                yield item, result
    if failed is not None:
        raise failed


def _examples(seeds: Sequence[str], own: Sequence[str], seed: str) -> list[str]:
    """Examples to show: three of four from the seeds, the others from what was made."""
    rng = random.Random(seed)
    fresh = rng.sample(list(own), min(len(own), NUM_EXAMPLES // 4))
    chosen = rng.sample(list(seeds), min(len(seeds), NUM_EXAMPLES - len(fresh))) + fresh
    rng.shuffle(chosen)
    return chosen


def more_request(examples: Sequence[str]) -> str:
    """The request for more instructions."""
    listed = "\n".join(f"{i}. {' '.join(each.split())}" for i, each in enumerate(examples, start=1))
    return MORE_PROMPTS.format(count=len(examples), examples=listed, asked=NUM_ASKED)


def _more(writing: Writing, examples: Sequence[str]) -> Reply:
    asked = [{"role": "user", "content": more_request(examples)}]
    return writing.endpoint.chat(
        asked, temperature=writing.temperature, max_tokens=writing.max_tokens
    )


def _new_prompts(reply: Reply, pool: Pool, wanted: int) -> Step:
    """The instructions of a numbered list that are new; the last is left out where it was cut."""
    listed: list[str] = _NUMBERED.findall(reply.text)
    if not reply.finished:
        listed = listed[:-1]
    outcomes: Counter[str] = Counter()
    results: list[dict[str, Any]] = []
    for text in listed:
        if len(results) == wanted:
            outcomes["not needed"] += 1
        elif not SHORTEST <= len(words(text)) <= LONGEST:
            outcomes["too short or long"] += 1
        elif not pool.add(text):
            outcomes["similar"] += 1
        else:
            outcomes["kept"] += 1
            results.append({"prompt": text})
    if not listed:
        outcomes["no list"] += 1
    return Step(results, outcomes, [reply])


def _answer(writing: Writing, prompt: Sequence[Mapping[str, str]]) -> Reply:
    return writing.endpoint.chat(
        prompt, temperature=writing.temperature, max_tokens=writing.max_tokens
    )


def _judge(writing: Writing, asked: str) -> Reply:
    return writing.judge.chat(
        [{"role": "user", "content": asked}], temperature=0.0, max_tokens=writing.max_tokens
    )


def _fault(reply: Reply) -> str | None:
    if not reply.finished:
        return "cut at max_tokens"
    return None if reply.text else "empty"


def _verdict(text: str) -> str | None:
    """The letter of a judge's reply: its only one, or that of its last line."""
    letters = set(_VERDICT.findall(text))
    if len(letters) > 1:
        letters = set(_VERDICT.findall(text.strip().splitlines()[-1]))
    return letters.pop() if len(letters) == 1 else None
