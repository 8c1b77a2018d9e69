"""An answer with everything that its judge may look at, and judging over all ranks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chatllama.runtime.distributed import all_gather_objects
from chatllama.text.chat_format import Message


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt of the data."""

    prompt: str
    """The last message of the user."""
    response: str
    messages: list[Message]
    """The whole conversation before the response."""
    where: str
    """`file:line` of the prompt."""
    columns: dict[str, Any]
    """The record that the prompt was read from."""

    @classmethod
    def of(cls, record: Mapping[str, Any], response: str) -> "Sample":
        """The answer to a tokenised prompt of `trainers/ppo/data.py::load_prompts`."""
        messages, columns = list(record["messages"]), json.loads(record["columns"])
        return cls(record["text"], response, messages, record["where"], columns)

    @property
    def conversation(self) -> list[Message]:
        """The messages with the response."""
        return [*self.messages, {"role": "assistant", "content": self.response}]

    def __str__(self) -> str:
        return f"{self.where} (prompt {self.prompt[:200]!r}, response {self.response[:200]!r})"


class Judge(Protocol):
    """What scores texts: a function, a model, servers."""

    def rows(self, count: int) -> Sequence[int]:
        """Which of `count` answers this rank scores."""
        ...

    def values(self, samples: Sequence[Sample]) -> list[float]:
        """One finite number for each of this rank's samples; ValueError names the one without."""
        ...


def judged(judge: Judge, samples: Sequence[Sample]) -> list[float]:
    """A value for each of all ranks' samples, from the rank that the judge assigns it to.

    An error of one rank is raised on all, so that none waits for the others.
    """
    rows, found, error = judge.rows(len(samples)), dict[int, float](), None
    try:
        found = dict(zip(rows, judge.values([samples[i] for i in rows]), strict=True))
    except ValueError as problem:
        error = str(problem)
    parts = all_gather_objects((found, error))
    if errors := [problem for _, problem in parts if problem is not None]:
        raise ValueError(errors[0])
    merged = {i: value for values, _ in parts for i, value in values.items()}
    return [merged[i] for i in range(len(samples))]
