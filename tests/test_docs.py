"""What docs, comments and docstrings name exists: files, functions, links, config keys, commands.

A function is written `rollout.py::sample_responses`: the end of a path, and a name defined there.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import lines
import pytest

PROJECT = Path(__file__).resolve().parent.parent
FOREIGN = {
    "llama/generation.py", "llama/tokenizer.py",  # meta-llama
    "fastchat/conversation.py", "models/serving.py",  # FastChat, vLLM
    "train_policy.py",  # lm-human-preferences
}  # fmt: skip
"""Files of other projects that comments cite as sources."""
PYTHON = re.compile(r"(?<![\w/.<*{\\-])([\w./-]*\w\.py)(?:::(\w+(?:\.\w+)?))?(?!\w)")
MODULE = re.compile(r"(?<![\w./=-])(?:chatllama|data|trainers)(?:\.[A-Za-z_]\w*)+")
FOLDER = re.compile(
    r"(?<![\w./-])((?:chatllama|data|trainers|tests|docs|configs)/[\w/]*/)(?![\w*])"
)
COMMENT = re.compile(r"#.*(?:\.py\b|(?:chatllama|data|trainers|tests|docs|configs)[./])")
SUFFIXES = {"json", "jsonl", "md", "py", "yaml"}


@cache
def files() -> list[Path]:
    """All files of the project that are in version control, or may come into it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.splitlines() if (path := PROJECT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    """Docs and settings whole; of Python files the docstrings and comments."""
    for path in files():
        if path.name == "CHANGELOG.md":  # it names what has gone
            continue
        if path.suffix == ".py":
            yield path, prose(path.read_text(encoding="utf-8"))
        elif path.suffix in (".md", ".yaml", ".yml", ".toml") or path.name in ("Makefile", "run"):
            yield path, path.read_text(encoding="utf-8")


def prose(source: str) -> str:
    """Comments and docstrings, those under constants and fields included."""
    found = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    if not COMMENT.search(source):  # tokenizing takes a second for all files
        return "\n".join(found)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(found + [token.string for token in tokens if token.type == tokenize.COMMENT])


def named_files(name: str, beside: Path) -> list[Path]:
    """The files that a name may mean: beside its text, or whose path ends with it."""
    if (near := (beside.parent / name).resolve()).is_file():
        return [near]
    parts = Path(name).parts
    found = [path for path in files() if path.relative_to(PROJECT).parts[-len(parts) :] == parts]
    exact = [path for path in found if path == PROJECT / name]
    return exact or found


@cache
def definitions(path: Path) -> set[str]:
    """Functions, classes, methods, fields and constants of a module."""
    found: set[str] = set()

    def add(body: list[ast.stmt], prefix: str = "") -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef) and not prefix:
                add(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names = [each.id for each in targets if isinstance(each, ast.Name)]
            found.update(prefix + name for name in names)
            if isinstance(node, ast.Assign) and names == ["__all__"]:
                found.update(ast.literal_eval(node.value))

    add(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def exists(dotted: str) -> bool:
    """Whether a dotted name is a package, a module, or something that a module defines."""
    place, parts = PROJECT, dotted.split(".")
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        rest = parts[number + 1 :]
        if (module := place / f"{part}.py").is_file():
            return not rest or ".".join(rest) in definitions(module)
        return ".".join(parts[number:]) in definitions(place / "__init__.py")
    return True


def faults(path: Path, text: str) -> Iterator[str]:
    for name, inside in PYTHON.findall(text):
        if name in FOREIGN:
            continue
        found = named_files(name, path)
        if not found:
            yield f"there is no {name}"
        elif inside and len(found) > 1:
            yield f"{name} is {len(found)} files: write more of the path"
        elif inside and inside not in definitions(found[0]):
            yield f"{name} defines no {inside}"
    for dotted in MODULE.findall(text):
        if dotted.rpartition(".")[2] not in SUFFIXES and not exists(dotted):
            yield f"there is no {dotted}"
    for folder in FOLDER.findall(text):
        if not (PROJECT / folder).is_dir():
            yield f"there is no folder {folder}"


def test_named_files_modules_and_functions_exist() -> None:
    found = [
        f"{path.relative_to(PROJECT)}: {fault}"
        for path, text in texts()
        for fault in faults(path, text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("in `gone.py`", "there is no gone.py"),
        ("see `trainers/ppo/gone.py`.", "there is no trainers/ppo/gone.py"),
        ("`ppo_math.py::gone`", "ppo_math.py defines no gone"),
        ("`train.py::main`", "train.py is 3 files: write more of the path"),
        ("`trainers.ppo.ppo_math.gone`", "there is no trainers.ppo.ppo_math.gone"),
        ("`chatllama.gone.x`", "there is no chatllama.gone.x"),
        ("`chatllama/gone/`", "there is no folder chatllama/gone/"),
    ],
)
def test_what_does_not_exist_is_found(text: str, fault: str) -> None:
    assert list(faults(PROJECT / "docs" / "x.md", text)) == [fault]


def test_what_exists_is_not() -> None:
    text = (
        "`ppo_math.py::gae`, `ppo/train.py::PpoTrainer.advance`, `trainers.ppo.ppo_math.gae`, "
        "`data.reading`, `data/reading/`, `chatllama.json`, `data.md`, train_*.py, "
        "`chatllama.__version__`"
    )
    assert list(faults(PROJECT / "docs" / "x.md", text)) == []


def pages() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


def test_the_reading_path_exists() -> None:
    path = [file.relative_to(PROJECT).as_posix() for file in lines.reading_path(PROJECT)]
    assert path[:2] == ["examples/ppo_flat.py", "train_sft.py"] and len(path) > 12
    assert all((PROJECT / name).is_file() for name in path), path


def test_links_lead_somewhere() -> None:
    for page in pages():
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not re.match("[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_lists_every_page_of_docs() -> None:
    index = (PROJECT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in pages():
        if page.parent == PROJECT / "docs" and page.name != "README.md":
            assert f"]({page.name})" in index, page.name


def test_the_site_has_every_page_of_docs() -> None:
    text = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE))
    written = {page.name for page in pages() if page.parent == PROJECT / "docs"}
    assert written - {"README.md"} <= shown
    made = set(re.findall(r'"([\w-]+\.md)"', (PROJECT / "docs" / "site_pages.py").read_text()))
    assert shown <= written | made


def test_make_targets_of_the_docs_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for page in pages():
        named = re.findall(
            r"(?:`|^ {4})make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert set(named) <= targets, page.name


def has_key(kind: Any, keys: list[str]) -> bool:
    """Whether a section of the config has a key; lists and optional sections are looked into."""
    from chatllama.config.base import Section

    if not keys:
        return True
    if isinstance(kind, type) and issubclass(kind, Section):
        field = kind.model_fields.get(keys[0])
        return field is not None and has_key(field.annotation, keys[1:])
    return any(has_key(part, keys) for part in get_args(kind))


def test_config_keys_of_the_docs_exist() -> None:
    from chatllama.config.schema import Config

    sections = "|".join(name for name in Config.model_fields)
    pattern = re.compile(rf"`((?:{sections})(?:\.[a-z][a-z_0-9]*)+)(?=[`=: ])")
    assert has_key(Config, ["ppo", "health", "action"])
    assert not has_key(Config, ["ppo", "health", "gone"])
    for page in pages():
        for key in pattern.findall(page.read_text(encoding="utf-8")):
            if key.rpartition(".")[2] not in SUFFIXES:
                assert has_key(Config, key.split(".")), f"{page.name}: {key}"
