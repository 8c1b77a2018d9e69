"""Notes on records: facts to count and report that are no reason to leave a record out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from chatllama.config.sources import Format
from data.reading.conversions import question_answer_keys
from data.reading.formats import PROMPT_KEYS, WEIGHTS, Raw, flag, role_of
from data.reading.marks import KEEP
from data.reading.verdicts import SETTLED, TWO_ANSWERS, VERDICTS, verdict

UNUSED = "key not used: "
_TURN_KEYS = {
    "role", "content", "from", "value", "name", "text", "tool_calls", "function_call", "mask",
    *WEIGHTS,
}  # fmt: skip
_MARKS = {
    "mask",
    "images",
    "image",
    "videos",
    "audios",
    "tools",
    "deleted",
    "review_result",
    KEEP,
    SETTLED,
}
_PROMPT = {*PROMPT_KEYS, "input", "history", "system", "system_prompt"}
_ANSWERS = {*_PROMPT, "question"}
_KEYS: dict[Format, set[str]] = {
    "alpaca": {"instruction", "input", "output", "history", "system", "system_prompt"},
    "messages": {"messages", "system", "system_prompt"},
    "sharegpt": {"conversations", "system", "system_prompt"},
    "prompt_completion": {"prompt", "completion", "system", "system_prompt"},
    "question_answer": {"system", "system_prompt"},
    "self_instruct": {"instruction", "instances"},
    "utterances": {"utterances"},
    "text": {"text"},
    "lines": {"text"},
    "preference": {*_ANSWERS, "chosen", "rejected", "margin", "score_chosen", "score_rejected"},
    "hh": {"chosen", "rejected", "margin"},
    "ranked": {*_PROMPT, "answers", "output", "ranks", "scores"},
    "comparison": {*_ANSWERS, *VERDICTS, *(key for pair in TWO_ANSWERS for key in pair)},
    "kto": {*_PROMPT, "completion", "output", "label"},
    "prompts": {*_PROMPT},
    "turns": {"turns"},
}
"""Of `oasst` and `translation` only what is inside is read, and other keys are not listed."""


def notes(fields: Raw, format: Format) -> list[str]:
    """What is to be counted of a record in a format, after a mapping of columns."""
    found: list[str] = []
    if format == "comparison":
        try:
            value, side = verdict(fields)
            found.append(f"verdict {side}: {value}")
        except ValueError:  # the record is left out with this reason
            pass
    turns = fields.get("conversations")
    if format == "sharegpt" and isinstance(turns, list):
        roles = [role_of(turn) for turn in cast("list[object]", turns)]
        if [role for role in roles if role != "system"][:1] == ["assistant"]:
            found.append("opens with the assistant: its turns before the first question are cut")
    return found + [UNUSED + key for key in sorted(_unused(fields, format))]


def _unused(fields: Raw, format: Format) -> Iterator[str]:
    known = _KEYS.get(format)
    if known is None:
        return
    if format == "alpaca" and "output" not in fields:  # Dolly
        known = known | {"response", "context"}
    if format == "question_answer":
        known = known | set(question_answer_keys(fields) or ())
    for key, value in fields.items():
        if key in known:
            if isinstance(value, list) and key != "instances":
                names = {str(k) for turn in value if isinstance(turn, Mapping) for k in turn}
                yield from (f"{key}[].{name}" for name in names - _TURN_KEYS)
        elif key in WEIGHTS and flag(value) is not None:  # 1 and true, which change nothing
            continue
        elif key not in _MARKS and not re.fullmatch(r"annotator\d+", str(key)):
            yield str(key)


def summary(counts: Mapping[str, int]) -> list[str]:
    """Lines for a report, from how often each note occurs."""
    sides: Counter[str] = Counter()
    values: list[str] = []
    for note, number in counts.items():
        if note.startswith("verdict "):
            side, value = note.removeprefix("verdict ").split(": ", 1)
            sides[side] += number
            values.append(f"{value} = {side}")
    lines = []
    if sides:
        said = ", ".join(f"{sides[side]} say {side}" for side in ("first", "second", "tie"))
        lines.append(f"verdicts: {said} ({'; '.join(sorted(values))})")
    rest = [note for note in counts if not note.startswith(("verdict ", UNUSED))]
    lines += [f"{counts[note]} records: {note}" for note in rest]
    unused = [f"{note.removeprefix(UNUSED)} ({counts[note]})" for note in counts if UNUSED in note]
    return [*lines, f"keys not used: {', '.join(unused)}"] if unused else lines


def count(rows: Iterable[list[str]]) -> dict[str, int]:
    """How often each note occurs, most frequent first."""
    return dict(Counter(note for row in rows for note in row).most_common())
