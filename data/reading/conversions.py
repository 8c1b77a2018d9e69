"""Conversions: formats that are another one in other words, or that hold several records at once.

Each becomes objects in a format that `formats.py` reads, and so does a column mapping of the
config. What they can be used for is decided in `records.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from chatllama.config.sources import ColumnMapping, Format
from data.reading.formats import (
    PROMPT_KEYS,
    Malformed,
    Raw,
    Unusable,
    checked_list,
    keys_of,
    mapping,
    number,
    objects,
    shorten,
)
from data.reading.marks import KEEP, deletion
from data.reading.translation import as_instruction
from data.reading.verdicts import TWO_ANSWERS, VERDICTS, two_answer_keys, verdict

Converted = tuple[str, Raw, Format]
"""What to append to the place, an object, and its format."""

QUESTION_KEYS, ANSWER_KEYS = ("question", "q", "query"), ("answer", "a", "response")
_MISSING = object()
OPTIONAL = ("input", "system", "history", "margin", "ranks", "scores")


def question_answer_keys(fields: Raw) -> tuple[str, str] | None:
    """The columns of question and answer, in any case; None if one is missing."""
    found = {str(key).strip().casefold(): str(key) for key in fields}
    question = next((found[key] for key in QUESTION_KEYS if key in found), None)
    answer = next((found[key] for key in ANSWER_KEYS if key in found), None)
    return None if question is None or answer is None else (question, answer)


def apply_mapping(fields: Raw, columns: ColumnMapping, *, answers_optional: bool) -> Raw:
    """The object under the keys of our formats; other columns are dropped.

    Raises:
        Malformed: a column that the mapping names is missing.
    """
    renamed: dict[str, object] = {}
    for key, name in columns.model_dump(exclude_none=True).items():
        value = _look_up(fields, name)
        if value is not None and value is not _MISSING:
            renamed[key] = value
        elif key not in OPTIONAL and not (answers_optional and key in ("completion", "output")):
            wrong = f"column {name!r} (format.{key}) is {'null' if value is None else 'missing'}"
            raise Malformed(f"{wrong}; the record has {keys_of(fields)}")
    return renamed


def _look_up(fields: Raw, name: str) -> object:
    """The content of the column `name`, `_MISSING` if there is none."""
    if name in fields:
        return fields[name]
    here: object = fields
    for part in name.split("."):
        if isinstance(here, dict) and part in here:
            here = cast("dict[str, object]", here)[part]
        elif isinstance(here, list) and part.isdecimal() and int(part) < len(here):
            here = cast("list[object]", here)[int(part)]
        else:
            return _MISSING
    return here


def fitting_formats(fields: Raw) -> list[Format]:
    """Every format whose keys the object has."""
    has = fields.keys()
    if {"chosen", "rejected"} <= has:
        transcript = isinstance(fields["chosen"], str) and not has & {*PROMPT_KEYS, "question"}
        return ["hh" if transcript else "preference"]
    is_tree = "message_tree_id" in has and isinstance(fields.get("prompt"), Mapping)
    if is_tree or ({"message_id", "role", "text"} <= has and "prompt" not in has):
        return ["oasst"]
    if two_answer_keys(fields):
        return ["comparison"]
    if isinstance(fields.get("answers"), list) or isinstance(fields.get("output"), list):
        return ["ranked"]
    tests: dict[Format, bool] = {
        "self_instruct": isinstance(fields.get("instances"), list),
        "messages": "messages" in has,
        "sharegpt": "conversations" in has,
        "utterances": isinstance(fields.get("utterances"), list),
        "alpaca": "instruction" in has and "instances" not in has,
        "prompt_completion": {"prompt", "completion"} <= has,
        "prompts": "prompt" in has and "completion" not in has,
        "text": "text" in has,
        "turns": isinstance(fields.get("turns"), list),
        "question_answer": question_answer_keys(fields) is not None,
        "translation": isinstance(fields.get("translation"), Mapping),
    }
    fitting: list[Format] = [format for format, fits in tests.items() if fits]
    answered = set(fitting) & {"messages", "sharegpt", "alpaca", "prompt_completion"}
    if answered and isinstance(fields.get("label"), bool):
        return ["kto"]
    return fitting


def convert(fields: Raw, format: Format, kind: str) -> list[Converted]:
    """The objects of a record in formats that `formats.py` reads; most records are one as it is.

    Raises:
        Malformed: the record does not have its format.
        Unusable: it has nothing for `kind`.
    """
    match format:
        case "self_instruct":
            return _instances(fields)
        case "question_answer":
            return [("", _question_answer(fields), "prompt_completion")]
        case "utterances":
            return [("", _utterances(fields), "messages")]
        case "turns":
            return [("", {"prompt": _first_turn(fields)}, "prompts")]
        case "lines" if kind == "prompts":
            return [("", {"prompt": fields.get("text")}, "prompts")]
        case "lines":
            return [("", fields, "text")]
        case "alpaca" if "output" not in fields and "response" in fields:  # Dolly
            dolly = {"output": fields["response"], "input": fields.get("context")}
            return [("", {**fields, **dolly}, "alpaca")]
        case "preference":
            return [("", _scored(fields), "preference")]
        case "comparison":
            return [("", _comparison(fields), "preference")]
        case "kto":
            return [("", *_labelled(fields, kind))]
        case "oasst":
            return _tree(fields, kind)
        case "translation":
            return [("", as_instruction(fields), "prompt_completion")]
        case _:
            return [("", fields, format)]


def _numbered(what: str, made: Sequence[tuple[Raw, Format]]) -> list[Converted]:
    if len(made) == 1:
        return [("", *made[0])]
    return [(f" ({what} {i} of {len(made)})", *each) for i, each in enumerate(made, start=1)]


def _instances(fields: Raw) -> list[Converted]:
    instances = objects(fields.get("instances"), "instances")
    if not instances:
        raise Unusable("no instances")
    shared = {"instruction": fields.get("instruction")}
    return _numbered("instance", [({**shared, **each}, "alpaca") for each in instances])


def _question_answer(fields: Raw) -> Raw:
    keys = question_answer_keys(fields)
    if keys is None:
        known = f"one of {QUESTION_KEYS} and one of {ANSWER_KEYS}"
        raise Malformed(f"expected the columns {known}, got {keys_of(fields)}")
    return {**fields, "prompt": fields[keys[0]], "completion": fields[keys[1]]}


def _utterances(fields: Raw) -> Raw:
    turns = objects(fields.get("utterances"), "utterances")
    messages = [{"role": turn.get("name"), "content": turn.get("text")} for turn in turns]
    return {**fields, "messages": messages}


def _first_turn(fields: Raw) -> object:
    """The first question; the later ones refer to answers that are not in the record."""
    turns = checked_list(fields.get("turns"), "turns")
    if not turns:
        raise Unusable("no turns")
    return turns[0]


def _labelled(fields: Raw, kind: str) -> tuple[Raw, Format]:
    """The conversation under a label; one with a bad answer is not for SFT."""
    if not label(fields) and kind == "sft":
        raise Unusable("labelled as a bad answer")
    bases: dict[str, Format] = {
        "messages": "messages",
        "conversations": "sharegpt",
        "completion": "prompt_completion",
        "instruction": "alpaca",
    }
    for key, format in bases.items():
        if key in fields:
            return fields, format
    keys = keys_of(fields)
    raise Malformed(f"a labelled answer needs one of the keys {[*bases]}, got {keys}")


def label(fields: Raw) -> bool:
    """Whether the answer of a `kto` record is labelled as good.

    Raises:
        Malformed: the label is not true or false (in a csv also as a word, or 1 and 0).
    """
    known = {"true": True, "false": False, "1": True, "0": False}
    value = fields.get("label")
    word = str(value).strip().lower()
    if isinstance(value, bool | int | str) and word in known:
        return known[word]
    raise Malformed(f"label: expected true or false, got {shorten(value)}")


def _comparison(fields: Raw) -> Raw:
    """`chosen` and `rejected` from two answers and the verdict on them."""
    keys = two_answer_keys(fields)
    if keys is None:
        known = " or ".join(f"{a} and {b}" for a, b in TWO_ANSWERS)
        raise Malformed(f"expected {known}, with one of the keys {VERDICTS}")
    _, side = verdict(fields)
    if side == "tie":
        raise Unusable("a tie")
    better, worse = keys if side == "first" else keys[::-1]
    made = {key: value for key, value in fields.items() if key not in (*keys, *VERDICTS)}
    return {**_with_prompt(made), "chosen": fields[better], "rejected": fields[worse]}


def _with_prompt(fields: Raw) -> Raw:
    """The fields with the question under `prompt`, where no prompt key is."""
    if any(key in fields for key in PROMPT_KEYS):
        return fields
    question = next((key for key in ("question", "input") if key in fields), None)
    return fields if question is None else {**fields, "prompt": fields[question]}


def _scored(fields: Raw) -> Raw:
    """A pair with UltraFeedback's scores: their difference is the margin.

    Raises:
        Unusable: the scores are equal, or are for the rejected answer.
    """
    by = [fields.get("score_chosen"), fields.get("score_rejected")]
    if None in by:
        return _with_prompt(fields)
    chosen, rejected = (number(each, "score_*") for each in by)
    if chosen == rejected:
        raise Unusable("a tie")
    if chosen < rejected:
        raise Unusable("score_chosen is below score_rejected")
    return {"margin": chosen - rejected, **_with_prompt(fields)}


def _tree(fields: Raw, kind: str) -> list[Converted]:
    """The contents of an OASST tree: threads of best answers, their prompts, or all rankings."""
    root = mapping(fields.get("prompt"), "prompt")
    made: list[tuple[Raw, Format]] = []
    if reason := deletion({**root, KEEP: fields.get(KEEP)}):
        raise Unusable(reason)
    for path, replies in _nodes(root, kind != "preferences", bool(fields.get(KEEP))):
        is_question = path[-1].get("role") != "assistant"
        turns = [{"role": node.get("role"), "content": node.get("text")} for node in path]
        ranked = [reply for reply in replies if _rank(reply) is not None]
        if kind == "prompts" and is_question:
            made.append(({"messages": turns}, "prompts"))
        elif kind == "preferences" and is_question and len(ranked) > 1:
            ranked.sort(key=_order)
            answers = [reply.get("text") for reply in ranked]
            ranks = [_rank(reply) for reply in ranked]
            made.append(({"messages": turns, "answers": answers, "ranks": ranks}, "ranked"))
        elif (
            kind == "sft" and not is_question and not any(reply.get("replies") for reply in replies)
        ):
            made.append(({"messages": turns}, "messages"))
    if not made:
        wanted = {"preferences": "ranked answers", "sft": "answers", "prompts": "prompts"}
        raise Unusable(f"no {wanted[kind]} in the tree")
    return _numbered("thread", made)


def _nodes(root: Raw, only_best: bool, keep: bool) -> Iterator[tuple[list[Raw], list[Raw]]]:
    """Every message of a tree with those above it, and its replies; the best one first.

    With `only_best`, of the answers to a question only the best-ranked is followed. Deleted and
    rejected messages, and what is below them, are passed over unless `keep`.
    """
    waiting: list[list[Raw]] = [[root]]
    while waiting:
        path = waiting.pop()
        replies = [each for each in _replies(path[-1]) if keep or not deletion(each)]
        yield path, replies
        followed = sorted(replies, key=_order)
        if only_best and path[-1].get("role") != "assistant":
            followed = followed[:1]
        waiting += [[*path, reply] for reply in reversed(followed)]


def _replies(message: Raw) -> list[Raw]:
    value = message.get("replies")
    return objects([] if value is None else value, "replies")


def deletions(tree: Raw) -> Iterator[str]:
    """The reason for each message below a tree's root that is passed over."""
    waiting = _replies(mapping(tree.get("prompt"), "prompt"))
    while waiting and not tree.get(KEEP):
        message = waiting.pop()
        if reason := deletion(message):
            yield reason
        else:
            waiting += _replies(message)


def _rank(reply: Raw) -> int | None:
    """The rank among the answers to one message, from 0; None for a message without."""
    rank = reply.get("rank")
    if rank is None or rank == "":
        return None
    try:
        number = float(cast(Any, rank))
        if isinstance(rank, bool) or not number.is_integer():
            raise ValueError(rank)
    except (TypeError, ValueError):
        raise Malformed(f"rank: expected a whole number or null, got {shorten(rank)}") from None
    return int(number)


def _order(reply: Raw) -> float:
    rank = _rank(reply)
    return float("inf") if rank is None else rank
