"""Verdicts on two answers: which columns hold them, and what their values mean in this source.

0 and 1 mean different things in different files, so numbers have no meaning of their own: the
config's `verdicts` gives it, or names and values of the whole column leave only one. Else the
source is refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from data.reading.formats import Malformed, Raw, Unusable, shorten

TWO_ANSWERS = (
    ("output_1", "output_2"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("answer_1", "answer_2"),
    ("response_0", "response_1"),
    ("response_a", "response_b"),
    ("conversation_a", "conversation_b"),
)
VERDICTS = ("preference", "label", "winner", "better_response_id")
WORDS = {
    **dict.fromkeys(("model_a", "a"), "first"),
    **dict.fromkeys(("model_b", "b"), "second"),
    **dict.fromkeys(("tie", "tie (bothbad)"), "tie"),
}
_SCALES = ("-1", "0", "1", "2", "3", "-1 to 0", "0 to 1", "1 to 2", "2 to 3", "true", "false")
PANDALM = {"0": "tie", "1": "first", "2": "second"}
SETTLED = "verdict meanings"
"""The key under which `source.py` adds the meanings of the column to a record."""


def two_answer_keys(fields: Raw) -> tuple[str, str] | None:
    """The columns of two answers with a verdict; None if there are none."""
    if not any(key in fields for key in VERDICTS) and not annotators(fields):
        return None
    return next((pair for pair in TWO_ANSWERS if set(pair) <= fields.keys()), None)


def annotators(fields: Raw) -> list[object]:
    """The votes of PandaLM's records."""
    return [fields[key] for key in fields if re.fullmatch(r"annotator\d+", str(key))]


def written(value: object) -> str | None:
    """A verdict as the keys of `verdicts` write it: 1 of 1, 1.0 and "1"; None if it is none."""
    if not isinstance(value, str | int | float):  # bool is an int
        return None
    text = str(value).strip().lower()
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return None
    return f"{number:.0f}" if number.is_integer() else repr(number)


def count(fields: Raw, counts: Counter[tuple[str, str]]) -> None:
    """Adds the verdict of a record to counts of (column, value); fractions by their neighbours."""
    key = next((key for key in VERDICTS if key in fields), None)
    if key is None or two_answer_keys(fields) is None or annotators(fields):
        return
    value = written(fields[key])
    if value is not None and value not in WORDS:
        number = _number(value)
        if number is not None and not number.is_integer():
            value = f"{math.floor(number)} to {math.floor(number) + 1}"
        if value in _SCALES:  # others are defects of single records
            counts[key, value] += 1


def settle(counts: Mapping[tuple[str, str], int], keys: tuple[str, str]) -> dict[str, str]:
    """What the numbers of a column mean; empty for a column of words.

    With answers numbered from 0, numbers from 0 to 1 name them; with answers numbered from 1, those
    from 1 to 2; with others, a column of 1 to 2 that has both, or fractions.

    Raises:
        Malformed: something else is possible too; gives the counts.
    """
    values = {value for _, value in counts}
    if not values:
        return {}
    if keys[0].endswith("_0") and values <= {"0", "1", "0 to 1"}:
        return {"0": "first", "1": "second"}
    named = keys[0].endswith("1") or "1 to 2" in values or {"1", "2"} <= values
    if named and values <= {"1", "2", "1 to 2"}:
        return {"1": "first", "2": "second"}
    listed = ", ".join(f"{value} ({number} times)" for (_, value), number in sorted(counts.items()))
    column = next(iter(counts))[0]
    raise Malformed(
        f"{column}: which answer is better with {listed} is not clear; say what each value means "
        "with the source's `verdicts`, as in `verdicts: {0: first, 1: second, 2: tie}`"
    )


def verdict(fields: Raw) -> tuple[str, str]:
    """The value of the verdict and what it says: first, second or tie.

    Raises:
        Malformed: the value has no meaning.
        Unusable: as many annotators are for the one as for the other.
    """
    known = cast("dict[str, str] | None", fields.get(SETTLED))
    votes = annotators(fields)
    if votes:
        sides = Counter(_side("annotator", vote, known or PANDALM) for vote in votes)
        (best, number), *others = sides.most_common()
        if others and others[0][1] == number:
            raise Unusable("the annotators disagree")
        return "most annotators", best
    key = next((key for key in VERDICTS if key in fields), None)
    if key is None:
        raise Malformed(f"expected one of the keys {VERDICTS}, got {sorted(map(str, fields))}")
    if known is None:
        counts: Counter[tuple[str, str]] = Counter()
        count(fields, counts)
        known = settle(counts, two_answer_keys(fields) or ("", ""))
    value = written(fields[key]) or ""
    fraction = _number(value) is not None and not cast(float, _number(value)).is_integer()
    return f"{key} {'between' if fraction else value}", _side(key, fields[key], known)


def _side(key: str, value: object, known: Mapping[str, str]) -> str:
    text = written(value)
    meanings = {**WORDS, **known}
    if text in meanings:
        return meanings[text]
    number = _number(text)
    ends = {side: _number(each) for each, side in known.items() if side != "tie"}
    first, second = ends.get("first"), ends.get("second")
    if number is not None and not number.is_integer() and None not in (first, second):
        share = (number - cast(float, first)) / (cast(float, second) - cast(float, first))
        if 0 < share < 1:
            return "tie" if share == 0.5 else "first" if share < 0.5 else "second"
    allowed = ", ".join(f"{each} ({side})" for each, side in meanings.items())
    raise Malformed(f"{key}: expected one of {allowed}, got {shorten(value)}; see `verdicts`")


def _number(text: str | None) -> float | None:
    try:
        number = float(cast(Any, text))
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
