"""Checks of records as they are written, before any tokenizer: one source at a time."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from datasets import Dataset

from data.checking.report import Findings, StageSource
from data.reading import notes
from data.reading.grouped import BELOW, JOINED
from data.reading.records import record_texts
from data.reading.source import GOOD, MALFORMED
from data.similarity import near_duplicates, script, words

# Reasons that belong to a format: such records are passed over, and nothing is wrong with them.
EXPECTED = (
    "labelled as a bad answer",
    "no answer with the other label to the same prompt",
    "a tie",
    "all answers are tied",
    "the annotators disagree",
    "no ranked answers in the tree",
    "deleted: true",
    "review_result: false",
    BELOW,
)
# Nothing is lost: the record is a part of another one.
_PARTS = ("joined with the other answers to its prompt", JOINED)
_REASONS = (
    ("empty_side", re.compile(r"^empty |^no turns|^no instances|^no answers")),
    ("role_order", re.compile(r"^roles do not|^the last turn|^role ")),
    ("chosen_equals_rejected", re.compile(r"^chosen equals|^all answers are equal|^one answer is")),
    ("different_prompts", re.compile(r"different prompts|does not begin with the prompt")),
)
_MARKS = re.compile(
    r"</?s>|<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|begin_of_text)\|>"
    r"|\[/?INST\]|<</?SYS>>|### (?:Instruction|Response):"
)


def check_records(rows: Dataset, part: StageSource, findings: Findings) -> list[int]:
    """Numbers of the rows of `read_rows` that hold a usable record.

    Fills in the source's figures; the defects go into `findings`.
    """
    severities: list[int] = rows["severity"][:]
    usable = [i for i, severity in enumerate(severities) if severity == GOOD]
    formats = {each for each in rows.unique("format") if each}
    part.format = "/".join(sorted(formats))
    part.num_records, part.num_usable = len(rows), len(usable)
    part.notes = notes.summary(notes.count(rows["notes"][:]))
    for i, severity in enumerate(severities):
        if severity != GOOD:
            _unusable(rows[i], severity == MALFORMED, part.name, findings)
    good = rows.select(usable)
    scripts: Counter[str] = Counter()
    for row in iterate(good):
        texts = record_texts(row)
        scripts[script("\n".join(texts))] += 1
        _check_texts(row["where"], texts, part.name, findings)
    part.scripts = dict(scripts.most_common())
    _duplicates(good, part, findings)
    return usable


def identity(row: dict[str, Any]) -> str:
    """What makes two records the same: all of their texts but for white space around them."""
    return "\x00".join(text.strip() for text in record_texts(row))


def question(row: dict[str, Any]) -> str:
    """The words of a record's user turns, or of its text: compared across sources."""
    turns = row.get("messages") or row.get("prompt")
    if not turns:
        return " ".join(words(row["text"]))
    texts = [turn["content"] for turn in turns if turn["role"] == "user"]
    return " ".join(words("\n".join(texts)))


def _unusable(row: dict[str, Any], malformed: bool, source: str, findings: Findings) -> None:
    problem, where = row["problem"], row["where"]
    if malformed:
        findings.add("malformed", source, problem)
    elif problem in EXPECTED:
        findings.add("passed_over", source, where, problem)
    elif problem not in _PARTS:
        check = next((name for name, pattern in _REASONS if pattern.search(problem)), "unusable")
        findings.add(check, source, where, problem)


def _check_texts(where: str, texts: list[str], source: str, findings: Findings) -> None:
    text = "\n".join(texts)
    if "\ufffd" in text:
        findings.add("broken_text", source, where)
    if not text.isprintable():
        strange = {c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t\r\x85"}
        if strange:
            listed = ", ".join(sorted(f"U+{ord(c):04X}" for c in strange))
            findings.add("control_characters", source, f"{where}: {listed}")
    if mark := _MARKS.search(text):
        findings.add("template_marks", source, f"{where}: {mark.group()}")


def _duplicates(good: Dataset, part: StageSource, findings: Findings) -> None:
    """Exact and near duplicates, and pairs that say the opposite of each other."""
    first: dict[str, int] = {}
    copies: set[int] = set()
    verdicts: dict[frozenset[str], str] = {}
    for i, row in enumerate(iterate(good)):
        own = identity(row)
        if own in first:
            copies.add(i)
            same = f"{row['where']} is {good[first[own]]['where']}"
            findings.add("duplicate", part.name, same)
        first.setdefault(own, i)
        if part.kind == "preferences":
            both = frozenset((str(row["prompt"]), *row["answers"]))
            before = verdicts.setdefault(both, row["answers"][0])
            if len(row["answers"]) == 2 and before != row["answers"][0]:
                findings.add("contradiction", part.name, row["where"])

    def text(i: int) -> str:
        return "\n".join(record_texts(cast(dict[str, Any], good[i])))

    for earlier, later in near_duplicates(len(good), text):
        if later not in copies:
            near = f"{good[later]['where']} is like {good[earlier]['where']}"
            findings.add("near_duplicate", part.name, near)


def iterate(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows, typed."""
    return cast(Iterator[dict[str, Any]], iter(rows))
