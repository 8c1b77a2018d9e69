"""mkdocs hook: pages made from other files of the project, and links that lead to them.

The pages of docs/ also read well as plain files, so their links lead to files of the project.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from chatllama import cli
from chatllama.config.errors import literal_values, nested_section
from chatllama.config.schema import Config
from chatllama.config.sources import DataSource

PROJECT = Path(__file__).resolve().parent.parent
COPIES = {
    "README.md": "index.md",
    "data/samples/README.md": "formats.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the project -> pages with their text."""
ELSEWHERE = {"configs/reference.yaml": "keys.md", "docs/README.md": "index.md"}
"""Files whose content is on a page of another form."""
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are no files of docs/."""
    texts = {page: _read(source) for source, page in COPIES.items()}
    texts |= {"keys.md": _keys(), "commands.md": _commands()}
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the project become links to pages of the site."""
    sources = {target: source for source, target in COPIES.items()}
    folder = Path(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    pages = {**COPIES, **ELSEWHERE}

    def moved(link: re.Match[str]) -> str:
        path = os.path.normpath(folder / link[1])
        return f"]({pages.get(path, path.removeprefix('docs/'))}{link[2] or ''})"

    return _LINK.sub(moved, markdown)


def _read(source: str) -> str:
    return (PROJECT / source).read_text(encoding="utf-8")


def _keys() -> str:
    """Every config key with its meaning and default, a heading for each section."""
    about = "A key is set in the YAML or, for one run, on the command line: `ppo.kl_coef=0.02`."
    parts = ["# Config keys", about, *_section(Config, "")]
    return "\n\n".join(parts) + "\n"


def _section(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """A section's own keys, then the sections inside it."""
    inner: dict[str, type[BaseModel]] = {}
    for name, field in section.model_fields.items():
        assert field.description is not None, (section, name)
        text = " ".join(field.description.split())
        nested = nested_section(field.annotation)
        if nested is not None:
            inner[name] = nested
            text += f" Keys: [`{prefix}{name}`](#{(prefix + name).replace('.', '')})."
        elif values := literal_values(field.annotation):
            text += f" One of: {', '.join(f'`{value}`' for value in values)}."
        default = "" if field.is_required() or nested else f" = {json.dumps(field.default)}"
        yield f"`{prefix}{name}{default}`\n:   {text}"
    for name, nested in inner.items():
        path = f"{prefix}{name}"
        yield f"## {path}"
        if nested is DataSource and path != "sft.data":
            yield "The keys of [`sft.data`](#sftdata)."
        else:
            yield from _section(nested, f"{path}.")


def _commands() -> str:
    """The help of every command."""
    parts = ["# Commands", _block(_help())]
    for name in _names(_help()):
        parts += [f"## chatllama {name}", _block(_help(name))]
        for inner in _names(_help(name)):
            parts += [f"### chatllama {name} {inner}", _block(_help(name, inner))]
    return "\n\n".join(parts) + "\n"


def _help(*words: str) -> str:
    os.environ["COLUMNS"] = "84"
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        cli.main([*words, "--help"])
    return text.getvalue()


def _names(text: str) -> list[str]:
    """The commands that a help lists."""
    return re.findall(r"^    ([a-z]+)(?= {2,}|$)", text, re.MULTILINE)


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
