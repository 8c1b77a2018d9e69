"""Reward functions, and `evaluation.gold`, as people write them, called for answers.

The forms are in docs/rewards.md. Processes with a time limit are in `processes.py`.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chatllama.config.base import load_function
from chatllama.config.ppo import RewardSource
from chatllama.runtime.distributed import rank, world_size
from trainers.functions.processes import Call, Outcome, ProcessPool, described
from trainers.functions.sample import Sample, judged

OWN = ("prompt", "response", "prompts", "completions", "messages")
"""Names that no column of the data can have for a function."""
GOLD = "evaluation.gold"
"""Key of the function that knows the true reward."""


class RewardFunction:
    """A function of the config that judges answers, in any of its forms.

    Args:
        key: of the function in the config, for messages.

    Raises:
        ValueError: it cannot be imported, or a time limit is set that nothing can enforce.
    """

    def __init__(self, source: RewardSource, key: str) -> None:
        assert source.function is not None
        self.name, self.source = source.function, source
        self.function = load_function(self.name, key)
        self.what = f"{'reward function' if key.startswith('ppo.') else key} {self.name}"
        try:
            parameters = dict(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):  # of some written in C
            parameters = {}
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.is_batched = "completions" in parameters
        named = [
            p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if not self.is_batched:  # the first two are prompt and response, whatever their names
            named = named[2:]
        self.names = {p.name for p in named}
        self.required = {p.name for p in named if p.default is p.empty} - set(OWN)
        self.is_async = inspect.iscoroutinefunction(self.function)
        if source.timeout is not None and not (source.processes or self.is_async):
            raise ValueError(
                f"{key.replace('function', 'timeout')}: {self.name} runs in the training process, "
                "where nothing can stop it: set processes, or make it an async function"
            )
        self.pool = (
            ProcessPool(self.name, source.processes, source.timeout) if source.processes else None
        )

    def rows(self, count: int) -> Sequence[int]:
        """Which of `count` answers this rank scores.

        A function of batches gets all answers of a step at once, on rank 0: what it sees does not
        depend on the number of ranks. Others are called once an answer, each on one rank.
        """
        if self.is_batched and self.pool is None:
            return range(count if rank() == 0 else 0)
        return range(rank(), count, world_size())

    def values(self, samples: Sequence[Sample]) -> list[float]:
        """One finite number for each of this rank's samples.

        Raises:
            ValueError: the function fails, takes too long or gives no number: names the record.
        """
        if not samples:
            return []
        if self.is_batched and self.pool is None:
            return self._of_batch(samples)
        calls = [self._call([each]) for each in samples]
        if self.pool is not None:
            outcomes = self.pool.run(calls)
        elif self.is_async:
            outcomes = asyncio.run(self._gather(calls))
        else:
            outcomes = [self._outcome(call) for call in calls]
        found = [
            self._settled(outcome, [sample])
            for outcome, sample in zip(outcomes, samples, strict=True)
        ]
        return [self._number(value, sample) for value, sample in zip(found, samples, strict=True)]

    def _of_batch(self, samples: Sequence[Sample]) -> list[float]:
        call = self._call(samples)
        outcome = asyncio.run(self._gather([call]))[0] if self.is_async else self._outcome(call)
        values = self._settled(outcome, samples)
        try:
            numbers = [values] * len(samples) if outcome.timed_out else list(values)
        except TypeError:
            numbers = []
        if len(numbers) != len(samples):
            raise ValueError(
                f"{self.what} gave {values!r:.200} for {len(samples)} answers: it "
                "must give a list with a number for each"
            )
        return [self._number(v, sample) for v, sample in zip(numbers, samples, strict=True)]

    def _call(self, samples: Sequence[Sample]) -> Call:
        """Arguments for one answer, or in batches for several."""
        first = samples[0]
        for name in self.required:
            if missing := [sample for sample in samples if name not in sample.columns]:
                raise ValueError(
                    f"{self.what} needs {name!r}, which {missing[0].where} does "
                    f"not have; its columns: {', '.join(missing[0].columns) or 'none'}"
                )
        columns = {name: None for sample in samples for name in sample.columns if name not in OWN}
        if not self.is_batched:
            given = {name: first.columns[name] for name in columns} | {"messages": first.messages}
            return Call((first.prompt, first.response), self._accepted(given))
        lists: dict[str, Any] = {
            name: [sample.columns.get(name) for sample in samples] for name in columns
        }
        lists["prompts"] = [sample.prompt for sample in samples]
        lists["completions"] = [sample.response for sample in samples]
        lists["messages"] = [sample.messages for sample in samples]
        return Call((), self._accepted(lists))

    def _accepted(self, given: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in given.items() if self.takes_all or k in self.names}

    def _outcome(self, call: Call) -> Outcome:
        try:
            return Outcome(self.function(*call.arguments, **call.keywords))
        except Exception as error:
            return Outcome(error=described(error))

    async def _gather(self, calls: Sequence[Call]) -> list[Outcome]:
        async def one(call: Call) -> Outcome:
            try:
                work = self.function(*call.arguments, **call.keywords)
                return Outcome(await asyncio.wait_for(work, self.source.timeout))
            except asyncio.TimeoutError:
                return Outcome(timed_out=True)
            except Exception as error:
                return Outcome(error=described(error))

        return list(await asyncio.gather(*map(one, calls)))

    def _settled(self, outcome: Outcome, samples: Sequence[Sample]) -> Any:
        """The value of a call; ValueError, with the record, where it has none."""
        if outcome.timed_out and self.source.timeout_score is not None:
            return self.source.timeout_score
        problem = outcome.error
        if outcome.timed_out:
            problem = (
                f"it took more than {self.source.timeout:g} s (timeout; timeout_score goes on)"
            )
        if problem is None:
            return outcome.value
        more = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
        raise ValueError(f"{self.what} failed for {samples[0]}{more}: {problem}")

    def _number(self, value: Any, sample: Sample) -> float:
        if self.pool is not None and self.is_batched and isinstance(value, list | tuple):
            value = value[0] if len(value) == 1 else value
        if not _is_finite(value):
            raise ValueError(
                f"{self.what} gave {value!r:.200} for {sample}: it must be a finite number"
            )
        return float(value)


def gold_function(
    name: str, key: str
) -> Callable[[Sequence[Mapping[str, Any]], Sequence[str]], list[float]]:
    """A gold function by its name, from records of prompts and an answer to each to values.

    It has any form of a reward function; `key`, the config's or an option, begins an error. Every
    rank must call what it returns.
    """
    function = RewardFunction(RewardSource(function=name), key)
    return lambda records, answers: judged(function, list(map(Sample.of, records, answers)))


def _is_finite(value: object) -> bool:
    """Whether it is a number (also of NumPy or torch), neither NaN nor infinite."""
    try:
        return math.isfinite(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        return False
