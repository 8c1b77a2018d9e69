"""Strict YAML 1.2: duplicate keys refused, `1e-5` is a number, `yes` is text, lines remembered."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from chatllama.config.errors import Place, Position

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema."""

    # A class variable in truth, which the type stubs do not say.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]


class _Dumper(yaml.SafeDumper):
    """Writes text that _Loader and YAML 1.1 readers understand alike (doubtful text is quoted)."""


for _name, _pattern, _first in _SCALARS:
    _characters = ["" if c == "\0" else c for c in _first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _characters)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)


def parse_value(text: str) -> Any:
    """The value of a command-line override, read as YAML.

    Raises:
        ValueError: it is not YAML, or a key is there twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        reader = _NodeReader(loader, "the value")
        value = reader.read(node, ())
    except yaml.YAMLError as error:
        raise ValueError(f"the value {text!r} is not valid YAML: {_one_line(error)}") from error
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    return value


def read_mapping(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[Place, Position]]:
    """The mapping in a YAML file, and where in the file each entry stands.

    Args:
        path: the file.
        problems: receives duplicate keys and keys that are not text; reading goes on after them.

    Raises:
        ValueError: no such file, or it is not one YAML mapping.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}: must be a mapping of sections, such as `sft: ...`")
        reader = _NodeReader(loader, str(path))
        content = reader.read(node, ())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from error
    problems.extend(reader.problems)
    return content, reader.places


def dump_yaml(content: dict[str, Any]) -> str:
    """`content` as YAML text in the order of its keys."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _one_line(error: yaml.YAMLError) -> str:
    """What and where, without PyYAML's picture of the place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


class _NodeReader:
    """Turns YAML nodes into values, keeping the line of every entry."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.problems: list[str] = []
        self.places: dict[Place, Position] = {}
        self._loader = loader
        self._source = source
        self._open: list[yaml.Node] = []

    def read(self, node: yaml.Node, place: Place) -> Any:
        """The value of `node`, which stands at `place`."""
        if any(node is outer for outer in self._open):
            raise yaml.constructor.ConstructorError(
                None, None, "an alias contains itself", node.start_mark
            )
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            return self._loader.construct_object(node, deep=True)
        self._open.append(node)
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self._read_mapping(node, place)
        else:
            value = []
            for index, item in enumerate(node.value):
                self._remember((*place, index), item)
                value.append(self.read(item, (*place, index)))
        self._open.pop()
        return value

    def _read_mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.read(key_node, place)
            line = key_node.start_mark.line + 1
            dotted = ".".join(str(part) for part in (*place, key))
            if not isinstance(key, str):
                self.problems.append(
                    f"{dotted} ({self._source}, line {line}): a key must be text, not {key!r}"
                )
                continue
            if key in mapping:
                before = self.places[(*place, key)].line
                self.problems.append(
                    f"{dotted} ({self._source}, line {line}): given twice, first in line {before}"
                )
            else:
                self._remember((*place, key), key_node)
            mapping[key] = self.read(value_node, (*place, key))
        return mapping

    def _remember(self, place: Place, node: yaml.Node) -> None:
        self.places[place] = Position(self._source, node.start_mark.line + 1)
