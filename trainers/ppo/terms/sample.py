"""An answer with everything that a term of the score may look at."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
