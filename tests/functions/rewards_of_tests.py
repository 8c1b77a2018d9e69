"""Reward functions in every form, also imported by the processes that call them."""

import asyncio
import os
import time
from typing import Any


def with_column(prompt: str, response: str, answer: float) -> float:
    return answer + len(response)


def with_all(prompt: str, response: str, **columns: Any) -> float:
    assert columns["messages"][-1]["content"] == prompt
    return float(columns["answer"])


def batch(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    assert len(columns["messages"]) == len(prompts)
    return [float(a or 0) + len(c) for a, c in zip(columns["answer"], completions, strict=True)]


def batch_of_names(completions: list[str], answer: list[float]) -> list[float]:
    return [a + len(c) for a, c in zip(answer, completions, strict=True)]


async def later(prompt: str, response: str) -> float:
    await asyncio.sleep(9 if response == "slow" else 0.02)
    return float(len(response))


async def batch_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(each)) for each in completions]


def careless(prompt: str, response: str) -> float:
    match response:
        case "slow":
            time.sleep(30)
        case "dead":
            os._exit(3)
        case "bad":
            raise KeyError("no such thing")
    return float(len(response))


def batch_careless(completions: list[str]) -> list[float]:
    return [careless("", each) for each in completions]


def too_few(completions: list[str]) -> list[float]:
    return [1.0]


def batch_beside_the_longest(completions: list[str]) -> list[float]:
    longest = max(map(len, completions))
    return [float(len(each) - longest) for each in completions]
