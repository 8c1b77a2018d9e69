"""Renders configs/reference.yaml from the schema.

    python -m chatllama.config.reference > configs/reference.yaml

Every key with its docstring and default. Sections and list entries that are absent by default are
written as comments. Nothing about a key is repeated here.
"""

import json
import textwrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chatllama.config.errors import literal_values, nested_section
from chatllama.config.schema import Config
from chatllama.config.sources import DataSource
from chatllama.config.yaml_reader import dump_yaml

EXAMPLES = {
    "run_dir": "runs/reference",
    "backbone.path": "huggyllama/llama-7b",
    "sft.data.path": "tatsu-lab/alpaca",
}
"""Example values of keys that have no default."""

_HEADER = """\
# Every key of a chatllama config: what it means, and its default. Not meant to be run: start from
# one of the other files here, or from a few keys of your own (`extends: other.yaml` takes the rest
# from there). Made by `python -m chatllama.config.reference`; a test keeps it equal to the schema.
"""


def render_reference() -> str:
    """The text of configs/reference.yaml."""
    smallest = {"run_dir": EXAMPLES["run_dir"], "backbone": {"path": EXAMPLES["backbone.path"]}}
    return _HEADER + "\n" + "\n".join(_render_section(Config.model_validate(smallest), "")) + "\n"


def _render_section(values: BaseModel, path: str) -> list[str]:
    """Lines of a section's keys, unindented; `path` is dotted with a dot at the end, or ""."""
    lines: list[str] = []
    for name, field in type(values).model_fields.items():
        value = values.__dict__[name]
        inner = nested_section(field.annotation)
        if not path and inner is not None:
            lines.append("")
        lines += _describe(field)
        if isinstance(value, BaseModel):
            lines += [f"{name}:", *_indent(_render_section(value, f"{path}{name}."))]
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines += [f"{name}:", *(line for entry in value for line in _entry(entry, path))]
        else:
            one_line = f"{name}: {json.dumps(value)}" if isinstance(value, list) else None
            lines.append(one_line or dump_yaml({name: value}).rstrip())
            if inner is not None:
                lines += [f"# {line}" if line else "#" for line in _absent(f"{path}{name}", inner)]
    return lines


def _entry(entry: BaseModel, path: str) -> list[str]:
    """A section as an entry of a list: its first key carries the dash."""
    lines = _indent(_render_section(entry, path))
    first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    lines[first] = "- " + lines[first][2:]
    return lines


def _absent(path: str, section: type[BaseModel]) -> list[str]:
    """The keys of a section or list entry that is absent by default (to become a comment)."""
    name = path.rpartition(".")[2]
    if section is DataSource:
        if path != "sft.data":
            return ["(entries as in sft.data)"]
        return [f"{name}:", *_entry(DataSource(path=EXAMPLES["sft.data.path"]), f"{path}.")]
    # Required lists inside are shown empty; everything else has its default.
    required: dict[str, Any] = {
        key: [] for key, field in section.model_fields.items() if field.is_required()
    }
    return [f"{name}:", *_indent(_render_section(section.model_construct(**required), f"{path}."))]


def _describe(field: FieldInfo) -> list[str]:
    """Comment lines: the docstring of a key, and its allowed values if they are listed."""
    assert field.description, field
    text, values = field.description, literal_values(field.annotation)
    if len(values) > 1:
        text += f" One of: {', '.join(map(str, values))}."
    return [f"# {line}" for line in textwrap.wrap(text, 90, break_on_hyphens=False)]


def _indent(lines: list[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]


if __name__ == "__main__":
    print(render_reference(), end="")
