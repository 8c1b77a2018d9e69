"""`ConfigError`, and pydantic's errors in plain words: key, file and line, value, allowed values.

Reads the schema for its suggestions; does not read files.
"""

import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from chatllama.config.nearest import OTHER_NAMES, did_you_mean
from chatllama.config.schema import Config

Place = tuple[str | int, ...]
"""Keys and list indices from the root of the YAML to an entry."""

MOST_KEYS = 5
"""Keys that a message lists."""
_REASONS = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "model_type": "must be a section with keys of its own",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}
"""Messages by pydantic's error type, with the fields of its context."""


@dataclass(frozen=True)
class Position:
    """File (or command line) and line of an entry."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


class ConfigError(ValueError):
    """Every problem of a config; `str()` is the message for the user."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {each}" for each in problems))


def explain(
    error: ValidationError, content: Mapping[str, Any], places: Mapping[Place, Position]
) -> tuple[list[str], list[Place]]:
    """One line for the user per wrong value of `content`, and the places of its unknown keys.

    If there are unknown keys, only they are reported: pydantic skips the cross-checks of their
    sections, so the rest is known only without them.
    """
    findings = error.errors(include_url=False)
    unknown = [each for each in findings if each["type"] == "extra_forbidden"]
    reasons: dict[Place, list[str]] = {}
    values: dict[Place, Any] = {}
    for each in unknown or findings:
        place = _real_place(each["loc"], content, each["type"])
        reason = _reason(each["type"], each.get("ctx", {}), each["msg"], place)
        reasons.setdefault(place, []).append(reason)
        values[place] = each["input"]
    lines: list[str] = []
    for place, given in reasons.items():
        line = f"{_dotted(place)}{_where(place, places)}: {' or '.join(dict.fromkeys(given))}"
        if given[0].startswith("must"):
            line += f", not {_show(values[place])}{_nearest(values[place], place)}"
        lines.append(line)
    return lines, list(reasons) if unknown else []


def _real_place(loc: Place, content: Any, kind: str) -> Place:
    """`loc` without the names that pydantic adds for the members of a union."""
    place: list[str | int] = []
    here = content
    for part in loc:
        if isinstance(here, dict) and (part in here or kind == "missing"):
            here = cast(dict[str | int, Any], here).get(part)
        elif isinstance(here, list) and isinstance(part, int):
            here = cast(list[Any], here)[part]
        else:
            continue
        place.append(part)
    return tuple(place)


def _reason(kind: str, ctx: Mapping[str, Any], message: str, place: Place) -> str:
    """What is wrong, without the value given."""
    if kind == "extra_forbidden":
        return "unknown key" + _suggestion(place)
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error" and (allowed := _allowed(place)):
        one_of = "one of " if len(allowed) > 1 else ""
        return f"must be {one_of}{', '.join(map(_show, allowed))}"
    if kind in _REASONS:
        return _REASONS[kind].format(**ctx)
    return message.replace("Input should be", "must be")


def _suggestion(place: Place) -> str:
    """The key that is meant, by its name elsewhere or as the nearest; else some of those known."""
    key, section = str(place[-1]), _model_at(place[:-1])
    siblings = list(section.model_fields) if section else []
    if key in OTHER_NAMES:
        ours = re.split("[:, ]", OTHER_NAMES[key])[0]
        own = [(*place[:-1], ours)] if ours in siblings else []
        named = own or [
            path for path in schema_paths(Config) if path[-1] == ours and len(path) == 2
        ]
        names = " or ".join(map(_dotted, named)) or ours
        return f"; here that is {names}{OTHER_NAMES[key].removeprefix(ours)}"
    if close := did_you_mean(key, siblings, 1):
        return close.replace("mean ", f"mean {''.join(f'{part}.' for part in place[:-1])}")
    elsewhere = [path for path in schema_paths(Config) if path[-1] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(map(_dotted, elsewhere[:MOST_KEYS]))}?"
    more = len(siblings) - MOST_KEYS
    rest = f" and {more} more (`chatllama configs copy reference` has all)" if more > 0 else ""
    return f"; known here: {', '.join(siblings[:MOST_KEYS])}{rest}"


def _nearest(value: Any, place: Place) -> str:
    """`; did you mean 'y'?` if one of the values allowed at `place` is close to this one."""
    texts = [each for each in _allowed(place) if isinstance(each, str)]
    close = did_you_mean(value, texts, 1) if isinstance(value, str) else ""
    return close.replace("mean ", 'mean "').replace("?", '"?')


def _allowed(place: Place) -> list[Any]:
    """The values that the key at `place` may have, if its type lists them."""
    names = [part for part in place if isinstance(part, str)]
    section = _model_at(tuple(names[:-1]))
    field = section.model_fields.get(names[-1]) if section and names else None
    return [] if field is None else literal_values(field.annotation)


def schema_paths(section: type[BaseModel], above: Place = ()) -> list[Place]:
    """Every key below `section`; the entries of a list have the key `*` in between."""
    paths: list[Place] = []
    for name, field in section.model_fields.items():
        paths.append((*above, name))
        inner = nested_section(field.annotation)
        if inner is not None:
            star = ("*",) if _is_list(field.annotation) else ()
            paths.extend(schema_paths(inner, (*above, name, *star)))
    return paths


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `X`, `X | None`, `list[X]` or `Annotated[...]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (nested_section(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)


def literal_values(annotation: Any) -> list[Any]:
    """The values that an annotation lists by `Literal`, at any depth."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        return [value for part in get_args(annotation) for value in literal_values(part)]
    return []


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_is_list, get_args(annotation)))


def _model_at(place: Place) -> type[BaseModel] | None:
    """The section class at `place`, list indices skipped."""
    model: type[BaseModel] | None = Config
    for part in place:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        model = nested_section(model.model_fields[part].annotation)
    return model


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place) or "config"


def _where(place: Place, places: Mapping[Place, Position]) -> str:
    """` (file, line N)` of the entry or of the nearest one around it."""
    for length in range(len(place), 0, -1):
        if place[:length] in places:
            return f" ({places[place[:length]]})"
    return ""


def _show(value: Any) -> str:
    """A value as YAML would write it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
