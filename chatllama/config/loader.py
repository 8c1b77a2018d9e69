"""YAML files as a checked `Config`: `extends:`, command-line overrides, every problem at once.

The keys are in `schema.py`, the wording of schema errors in `errors.py`. Imports nothing heavy, so
that a misspelt key is reported within a second.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from chatllama.config.errors import ConfigError, Place, Position, explain
from chatllama.config.schema import Config
from chatllama.config.yaml_reader import dump_yaml, parse_value, read_mapping

WRITTEN = "# Written by chatllama"
"""How the config.yaml of a run folder begins."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a YAML file, its parents and the command line's overrides.

    Args:
        path: the YAML file. Its `extends: other.yaml` names one parent, relative to the file;
            mappings merge key by key, everything else (lists, null) replaces the parent's value.
        overrides: `section.key=value` each, applied last; the value is read as YAML.

    Raises:
        ConfigError: with every problem of the files and overrides in one message.
    """
    problems: list[str] = []
    places: dict[Place, Position] = {}
    content = _read_with_parents(Path(path), problems, places)
    for override in overrides:
        try:
            _apply_override(content, override, places)
        except ValueError as error:
            shown = override if len(override) <= 200 else override[:197] + "..."
            problems.append(f"override {shown!r}: {error}")
    config = _validate(content, places, problems)
    if problems or config is None:
        raise ConfigError(str(path), problems)
    return config


def dump_config(cfg: Config, path: str | Path) -> None:
    """Writes every resolved value to `path`; `load_config(path)` gives an equal object."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".tmp")
    text = ": every value resolved; can be loaded as it is.\n"
    beside.write_text(WRITTEN + text + dump_yaml(cfg.model_dump()), encoding="utf-8")
    beside.replace(target)


def _read_with_parents(
    path: Path, problems: list[str], places: dict[Place, Position], children: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The file's mapping merged over its parents'; fills `problems` and `places`."""
    chain = (*children, Path(os.path.realpath(path)))  # resolve() raises on a circle of links
    if chain[-1] in children:
        names = " -> ".join(map(str, chain))
        raise ConfigError(str(chain[0]), [f"extends goes round in a circle: {names}"])
    try:
        content, own_places = read_mapping(path, problems)
    except ValueError as error:
        raise ConfigError(str(path), [*problems, str(error)]) from error
    merged: dict[str, Any] = {}
    if "extends" in content:
        parent = content.pop("extends")
        if isinstance(parent, str):
            merged = _read_with_parents(path.parent / parent, problems, places, chain)
        else:
            problems.append(f"extends: must be one file name, not {parent!r} ({path})")
    _forget_below({place[:-1] for place in own_places if place[-1] == 0}, places)
    places.update(own_places)
    return _merge(merged, content)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """`parent` with the child's values: mappings merge, everything else replaces."""
    merged = dict(parent)
    for key, value in child.items():
        above, below = _mapping(merged.get(key)), _mapping(value)
        merged[key] = value if above is None or below is None else _merge(above, below)
    return merged


def _apply_override(content: dict[str, Any], override: str, places: dict[Place, Position]) -> None:
    """Sets one `section.key=value` in `content`, with new mappings where there are none.

    Raises:
        ValueError: it has another form, or leads through a value that has no keys.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ValueError("must look like section.key=value")
    if keys[0] == "extends":
        raise ValueError("extends works in files only")
    value = parse_value(text)
    inner = content
    for depth, key in enumerate(keys[:-1], start=1):
        if inner.get(key) is None:
            inner[key] = {}
        below = _mapping(inner[key])
        if below is None:
            raise ValueError(
                f"{'.'.join(keys[:depth])} is {inner[key]!r}, which has no keys; set it as a whole"
            )
        inner = below
    inner[keys[-1]] = value
    _forget_below({tuple(keys)}, places)
    for depth in range(1, len(keys) + 1):
        places.setdefault(tuple(keys[:depth]), Position("the command line"))
    places[tuple(keys)] = Position("the command line")


def _mapping(value: Any) -> dict[str, Any] | None:
    """`value` if it is a mapping, else None."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _forget_below(replaced: set[Place], places: dict[Place, Position]) -> None:
    """Drops the positions of everything inside the `replaced` entries."""
    for place in list(places):
        if any(place[:length] in replaced for length in range(1, len(place))):
            del places[place]


def _validate(
    content: dict[str, Any], places: dict[Place, Position], problems: list[str]
) -> Config | None:
    """The Config, or None and the reasons appended to `problems`."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines, unknown = explain(error, content, places)
        problems.extend(lines)
    if unknown:
        for place in unknown:
            content = _without(content, place)
        _validate(content, places, problems)
    return None


def _without(tree: Any, place: Place) -> Any:
    """A copy of `tree` without the entry at `place`."""
    head, rest = place[0], place[1:]
    if isinstance(tree, list):
        items = cast(list[Any], tree)
        return [_without(x, rest) if i == head else x for i, x in enumerate(items)]
    if not rest:
        return {key: value for key, value in tree.items() if key != head}
    return {key: _without(x, rest) if key == head else x for key, x in tree.items()}
