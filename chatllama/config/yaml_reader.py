"""Strict YAML 1.2: duplicate keys are errors, `1e-5` is a number, `yes` is text, lines are kept.

What the keys mean is in the schema.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from chatllama.config.errors import Place, Position

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"^(?:~|null|Null|NULL|)$",
    "bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "int": r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema."""


class _Dumper(yaml.SafeDumper):
    """Writes text that _Loader and YAML 1.1 readers read alike (ambiguous text is quoted)."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), [None])
_Loader.add_constructor(_TAG + "int", _construct_int)


def parse_value(text: str) -> Any:
    """The value of a command-line override, read as YAML.

    Raises:
        ValueError: it is not YAML, or has a duplicate key.
    """
    try:
        value, reader = _read(text, "the value")
    except yaml.YAMLError as error:
        raise ValueError(f"the value {text!r} is not valid YAML: {_one_line(error)}") from error
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    return value


def read_mapping(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[Place, Position]]:
    """The mapping in a YAML file, and the position of each entry in the file.

    Adds duplicate keys and keys that are not text to `problems`, and reads on after them.

    Raises:
        ValueError: there is no such file, or it is not one YAML mapping.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        content, reader = _read(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of sections, such as `sft: ...`")
    problems.extend(reader.problems)
    return content or {}, reader.places


def dump_yaml(content: dict[str, Any]) -> str:
    """`content` as YAML text in the order of its keys."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read(text: str, source: str) -> tuple[Any, "_NodeReader"]:
    """The value of the one document in `text` (None if it is empty), and its reader."""
    loader = _Loader(text)
    reader = _NodeReader(loader, source)
    node = loader.get_single_node()
    return None if node is None else reader.read(node, ()), reader


def _one_line(error: yaml.YAMLError) -> str:
    """The problem and its line and column, without PyYAML's excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


class _NodeReader:
    """Turns YAML nodes into values and keeps the line of every entry."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.problems: list[str] = []
        self.places: dict[Place, Position] = {}
        self._loader = loader
        self._source = source
        self._open: list[yaml.Node] = []

    def read(self, node: yaml.Node, place: Place) -> Any:
        """The value of `node`, which is at `place`."""
        if any(node is outer for outer in self._open):
            raise yaml.constructor.ConstructorError(
                None, None, "an alias contains itself", node.start_mark
            )
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            return self._loader.construct_object(node, deep=True)
        self._open.append(node)
        value: Any = []
        if isinstance(node, yaml.MappingNode):
            value = self._read_mapping(node, place)
        else:
            for index, item in enumerate(node.value):
                self.places[(*place, index)] = self._position(item)
                value.append(self.read(item, (*place, index)))
        self._open.pop()
        return value

    def _read_mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.read(key_node, place)
            position = self._position(key_node)
            inside = (*place, key)
            where = f"{'.'.join(map(str, inside))} ({position})"
            if not isinstance(key, str):
                self.problems.append(f"{where}: a key must be text, not {key!r}")
                continue
            if key in mapping:
                before = self.places[inside].line
                self.problems.append(f"{where}: given twice, first in line {before}")
            else:
                self.places[inside] = position
            mapping[key] = self.read(value_node, inside)
        return mapping

    def _position(self, node: yaml.Node) -> Position:
        return Position(self._source, node.start_mark.line + 1)
