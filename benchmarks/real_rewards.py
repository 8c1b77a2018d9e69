"""Rewards of `benchmarks/real.py` that a program computes, and the data that they need.

Sums are made here: reasoning-gym, whose `chain_sum` is this task, brings eleven packages, one of
which needs a C compiler. The constraints are a few of IFEval's (arXiv 2311.07911), of those that
need neither language detection nor a tokenizer of sentences: the same words give the same reward.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

CHECKS: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "lower": ("Use lower case letters only.", lambda text, _: text == text.lower()),
    "upper": ("Use capital letters only.", lambda text, _: text == text.upper()),
    "no_comma": ("Do not use any commas.", lambda text, _: "," not in text),
    "at_most": ("Use at most {} words.", lambda text, n: len(words(text)) <= int(n)),
    "at_least": ("Use at least {} words.", lambda text, n: len(words(text)) >= int(n)),
    "keyword": ('Include the word "{}".', lambda text, word: word in words(text.lower())),
    "forbidden": ('Do not use the word "{}".', lambda text, word: word not in words(text.lower())),
    "quotation": (
        "Put your whole answer in double quotation marks.",
        lambda text, _: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    ),
    "ending": ('End with the words "{}".', lambda text, end: text.strip().endswith(end)),
    "json": ("Answer in JSON.", lambda text, _: _is_json(text)),
}
"""What is asked, and whether a text does so, given the asked value."""
VALUES = {
    "at_most": ["8", "12"],
    "at_least": ["12", "16"],
    "keyword": ["water", "people", "world", "often"],
    "forbidden": ["the", "is", "and"],
    "ending": ["That is all.", "Any questions?"],
}
TOPICS = """
    apples bees bicycles birds boats books bread bridges butterflies candles cats chairs cheese
    clocks clouds coffee cows deserts dogs dolphins elephants fire fish flowers foxes frogs
    gardens glass gold grass hats honey horses ice islands keys kites lakes lamps lemons lions
    maps milk mirrors money moon mountains music oceans owls paper pianos pigs planes rain
    rivers roads roses salt sand schools shoes silk snow soap spiders stars stones sugar summer
    tea tigers tomatoes towers trains trees violins whales wheels wind windows winter wolves wool
""".split()  # noqa: SIM905


def words(text: str) -> list[str]:
    r"""Runs of letters, digits and _, as IFEval counts them (\w+)."""
    return re.findall(r"\w+", text)


def constraints(seed: int, held_out: bool, count: int) -> list[dict[str, Any]]:
    """Questions with one or two constraints: columns `prompt`, `checks`, `values`.

    Args:
        seed: of the choice.
        held_out: about topics that no other file asks about.
        count: of questions.
    """
    rng = random.Random(seed)
    topics = TOPICS[::4] if held_out else [t for i, t in enumerate(TOPICS) if i % 4]
    made = []
    while len(made) < count:
        names = rng.sample(list(CHECKS), rng.choice((1, 2)))
        if set(names) in CONTRADICTIONS or ("json" in names and len(names) > 1):
            continue
        values = [rng.choice(VALUES.get(name, [""])) for name in names]
        asked = [CHECKS[name][0].format(value) for name, value in zip(names, values, strict=True)]
        prompt = " ".join([f"Tell me something about {rng.choice(topics)}.", *asked])
        made.append({"prompt": prompt, "checks": names, "values": values})
    return made


CONTRADICTIONS = (
    {"lower", "upper"}, {"at_most", "at_least"}, {"upper", "ending"}, {"lower", "ending"},
    {"quotation", "ending"}, {"upper", "keyword"},
)  # fmt: skip


def followed(prompt: str, response: str, checks: Sequence[str], values: Sequence[str]) -> float:
    """Share of the constraints that an answer follows; an empty answer follows none."""
    if not response.strip():
        return 0.0
    kept = [CHECKS[name][1](response, value) for name, value in zip(checks, values, strict=True)]
    return sum(kept) / len(kept)


def sums(seed: int, count: int) -> list[dict[str, Any]]:
    """Sums of two numbers of one or two digits, each once.

    Returns:
        Records with the columns `prompt` and `answer`.
    """
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        left, right = (rng.randint(1, rng.choice((9, 99))) for _ in range(2))
        found[f"What is {left} + {right}?"] = str(left + right)
    questions = list(found)
    rng.shuffle(questions)  # what can be asked in few ways came early
    return [{"prompt": question, "answer": found[question]} for question in questions]


def right(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of an answer is the right one."""
    numbers = re.findall(r"-?\d+", response)
    return float(bool(numbers) and numbers[-1] == answer)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
