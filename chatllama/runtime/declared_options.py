"""Options of a command, each declared once: a dataclass field with its help and its limit.

The command line, the checks and the object that is passed on all come from the field. Positional
arguments, and options that only say where to read or write, stay with the commands.
"""

import argparse
import types
from collections.abc import Callable, Collection
from dataclasses import Field, field, fields
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

Options = TypeVar("Options")
METAVARS = {int: "N", float: "X", str: "TEXT"}


class Limit(NamedTuple):
    """The values that an option may have."""

    text: str
    """Completes `--name value: `."""
    holds: Callable[[Any], bool]


def at_least(least: int) -> Limit:
    """The limit of a count."""
    return Limit(f"must be at least {least}", lambda value: value >= least)


def between(least: int, most: int) -> Limit:
    """The limit of a number with bounds."""
    return Limit(f"must be between {least} and {most}", lambda value: least <= value <= most)


ABOVE_0 = Limit("must be above 0", lambda value: value > 0)


def option(
    default: Any,
    help: str,
    *,
    limit: Limit | None = None,
    metavar: str | None = None,
    flag: str | None = None,
) -> Any:
    """A field of a keyword-only dataclass that is an option of a command as well.

    Args:
        default: shown in the help if it is a number.
        help: for `--help`, and the field's documentation.
        limit: checked by `check_limits`, unless the value is None.
        metavar: the value's name in `--help`. None: by its type.
        flag: None: `--` and the field's name with hyphens.
    """
    about = {"help": help, "limit": limit, "metavar": metavar, "flag": flag}
    return field(default=default, metadata=about)


def add_options(parser: argparse.ArgumentParser, cls: type, only: Collection[str] = ()) -> None:
    """Declares the options of a dataclass, or only those named."""
    for each in (each for each in _declared(cls) if not only or each.name in only):
        kind, choices = _kind(each.type)
        help, default = each.metadata["help"], each.default
        keywords: dict[str, Any] = {"default": default, "dest": each.name}
        if kind is bool:
            keywords["action"] = "store_true"
        elif kind is tuple:
            keywords |= {"action": "append", "default": []}
        else:
            keywords |= {"type": kind, "choices": choices}
            if default is not None and "default" not in help:
                shown = f"{default:g}" if kind is float else default
                help += f" (default: {shown})"
        metavar = each.metadata["metavar"] or (None if choices else METAVARS.get(kind))
        if metavar and kind is not bool:
            keywords["metavar"] = metavar
        parser.add_argument(_flag(each), help=help, **keywords)


def options_from(cls: type[Options], arguments: argparse.Namespace, **others: Any) -> Options:
    """The dataclass filled from parsed arguments; fields that no option sets are in `others`."""
    typed = vars(arguments)
    values = {each.name: typed[each.name] for each in _declared(cls) if each.name in typed}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return cls(**values | lists | others)


def check_limits(options: Any) -> None:
    """Raises ValueError for the first option outside its limit."""
    for each in _declared(type(options)):
        value, limit = getattr(options, each.name), each.metadata["limit"]
        if value is not None and limit is not None and not limit.holds(value):
            raise ValueError(f"{_flag(each)} {value}: {limit.text}")


def _declared(cls: Any) -> list[Field]:
    return [each for each in fields(cls) if "help" in each.metadata]


def _flag(option: Field) -> str:
    return option.metadata["flag"] or "--" + option.name.replace("_", "-")


def _kind(annotation: Any) -> tuple[type, tuple[str, ...] | None]:
    """Type of a field's values, without None, and the choices of a Literal."""
    options = [each for each in get_args(annotation) if each is not types.NoneType]
    if get_origin(annotation) is not Literal and len(options) == 1:
        annotation = options[0]
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    return get_origin(annotation) or annotation, None
