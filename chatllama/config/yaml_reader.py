"""Strict YAML 1.2: duplicate keys are errors, `1e-5` is a number, `yes` is text, lines are kept.

What the keys mean is in the schema.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from chatllama.config.errors import Place, Position
from chatllama.config.nearest import files_like

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
MAX_BYTES, MAX_DEPTH, MAX_NODES = 250_000, 50, 20_000
"""Limits on a YAML text; nodes are counted with every use of an alias."""
_TEXT_KEYED = "verdicts"
"""The one section whose keys are the user's own values, and text however they are written."""


def parse_value(text: str) -> Any:
    """The value of a command-line override, read as YAML.

    Raises:
        ValueError: it is not YAML, or has a duplicate key.
    """
    try:
        value, reader = _read(text, "the value", comments=False)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not valid YAML: {_one_line(error)}") from error
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    return value


def read_mapping(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[Place, Position]]:
    """The mapping in a YAML file, and the position of each entry in the file.

    Adds duplicate keys and keys that are not text to `problems`, and reads on after them.

    Raises:
        ValueError: there is no such file, or it is not one YAML mapping.
    """
    try:
        if not path.is_file():
            raise ValueError(_no_file(path))
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: over {MAX_BYTES:,} bytes, too large for a config")
        content, reader = _read(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of sections, such as `sft: ...`")
    problems.extend(reader.problems)
    return content or {}, reader.places


def _no_file(path: Path) -> str:
    """Why there is nothing to read at a path, with what may have been meant."""
    if path.is_dir():
        inside = path / "config.yaml"
        remedy = f"its config is {inside}" if inside.is_file() else "give a YAML file"
        return f"{path} is a folder; {remedy}"
    if path.exists():
        return f"not a regular file: {path}"
    shipped = Path(__file__).resolve().parents[2] / "configs" / f"{path.stem}.yaml"
    if shipped.is_file():
        return f"no such file: {path}; `chatllama configs copy {path.stem}` makes one here"
    return f"no such file: {path}{files_like(path)}"


def dump_yaml(content: dict[str, Any]) -> str:
    """`content` as YAML text in the order of its keys."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read(text: str, source: str, *, comments: bool = True) -> tuple[Any, "_NodeReader"]:
    """The value of the one document in `text` (None if it is empty), and its reader."""
    _check_size(text)
    loader = _Loader(text)
    reader = _NodeReader(loader, source)
    node = loader.get_single_node()
    rest = text if node is None else text[node.end_mark.index :]
    if not comments and rest.lstrip().startswith("#"):
        reader.problems.append(
            f"{rest.strip()!r} would be cut off as a comment of YAML; put quotation marks around "
            "the whole value, inside those of the shell: key='\"text #1\"'"
        )
    return None if node is None else reader.read(node, ()), reader


def _check_size(text: str) -> None:
    """Raises YAMLError for text too long, too deeply nested, or with tags beyond the core schema.

    Goes through events, which needs no recursion.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"over {MAX_BYTES:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        starts = isinstance(event, yaml.CollectionStartEvent)
        depth += starts - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        if not isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) or not event.tag:
            continue
        tag: str = event.tag
        names = ("map",) if isinstance(event, yaml.MappingStartEvent) else ("seq",)
        if isinstance(event, yaml.ScalarEvent):
            fitting = [each for each, form in _SCALARS.items() if re.match(form, event.value)]
            names = ("str", *fitting, *(["float"] if "int" in fitting else []))
        if tag not in [_TAG + name for name in names]:
            shown = tag.replace(_TAG, "!!")
            wrong = f"the tag {shown} does not fit its value; here fit {', '.join(names)}"
            raise _error(wrong, event.start_mark)


def _error(problem: str, mark: yaml.Mark | None) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _one_line(error: yaml.YAMLError) -> str:
    """The problem and its line and column, without PyYAML's excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None


class _NodeReader:
    """Turns YAML nodes into values and keeps the line of every entry."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.problems: list[str] = []
        self.places: dict[Place, Position] = {}
        self._loader = loader
        self._source = source
        self._open: list[yaml.Node] = []
        self._num_nodes = 0

    def read(self, node: yaml.Node, place: Place) -> Any:
        """The value of `node`, which is at `place`."""
        if any(node is outer for outer in self._open):
            raise _error("an alias contains itself", node.start_mark)
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES or len(self._open) > MAX_DEPTH:
            limits = f"over {MAX_NODES:,} entries, or {MAX_DEPTH} levels, with all aliases"
            raise _error(limits, node.start_mark)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            try:
                return self._loader.construct_object(node, deep=True)
            except ValueError as error:  # more digits than Python converts
                raise _error(str(error), node.start_mark) from None
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
        merged = [self._read_merged(value, place) for key, value in node.value if _is_merge(key)]
        defaults = {key: value for each in reversed(merged) for key, value in each.items()}
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                continue
            key = self.read(key_node, place)
            if place[-1:] == (_TEXT_KEYED,) and isinstance(key_node, yaml.ScalarNode):
                key = str(key_node.value)
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
        return defaults | mapping

    def _read_merged(self, node: yaml.Node, place: Place) -> dict[str, Any]:
        """The mapping under a merge key `<<`, or those of its list; the first has precedence."""
        value = self.read(node, place)
        each = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in each):
            position = self._position(node)
            self.problems.append(f"<< ({position}): must be a mapping, or a list of them")
            return {}
        return {key: value for one in reversed(each) for key, value in one.items()}

    def _position(self, node: yaml.Node) -> Position:
        return Position(self._source, node.start_mark.line + 1)
