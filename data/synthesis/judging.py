"""What a judge of two answers is asked, and how its reply is read; requests are in `client.py`."""

import re
from collections.abc import Mapping, Sequence

JUDGE = """Two answers to the same request are shown. Which one would the person who asked rather \
have? Judge whether it is correct, helpful, harmless and to the point; length alone is no merit.

[Request]
{request}

[Answer A]
{one}

[Answer B]
{two}

Reply with one letter: A, B, or C if neither is better."""
_BRACKETED = re.compile(r"\[\[([ABC])\]\]")
_VERDICT = re.compile(r"(?<![A-Za-z])([ABC])(?![A-Za-z])")
_ARTICLE = re.compile(
    r"\bA (?!(?:is|was|wins|has|gives|does|over|because|since|and|or)\b)(?=[a-z])"
)


def shown(messages: Sequence[Mapping[str, object]]) -> str:
    """A conversation as text; one message as it is."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def verdict(text: str) -> str | None:
    """The letter of a judge's reply; None where it has none, or several.

    The last in double brackets, as MT-Bench's judges write it; else its only one, or that of its
    last line.
    """
    if bracketed := _BRACKETED.findall(text):
        return bracketed[-1]
    text = _ARTICLE.sub("", text).strip()
    letters = set(_VERDICT.findall(text))
    if len(letters) > 1:
        letters = set(_VERDICT.findall(text.splitlines()[-1]))
    return letters.pop() if len(letters) == 1 else None
