"""The floors of the code base: import-linter's contracts hold, and can fail; what it cannot see."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("chatllama", "data", "trainers")
TRL = "trainers/sft/data.py"


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))]


def where(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Dotted names imported anywhere below `tree`; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text(encoding="utf-8")))


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("data/mixture.py", "import chatllama.model.roles", "data imports"),
        ("chatllama/model/roles.py", "import chatllama.text.tokenizer", "chatllama.model imports"),
        ("chatllama/text/padding.py", "import trainers.ppo.train", "chatllama.text imports"),
        ("trainers/reward/train.py", "import trainers.ppo.rewards", "Floors of trainers"),
        ("data/reading/records.py", "import data.reading.source", "No circles"),
        ("chatllama/config/base.py", "import torch", "No torch in config"),
        (
            "chatllama/planning/shape.py",
            "import chatllama.model.roles",
            "chatllama.planning imports",
        ),
        ("trainers/ppo/train.py", "import deepspeed", "DeepSpeed in the engine only"),
        ("trainers/ppo/ppo_math.py", "import chatllama.config.base", "The arithmetic rests"),
    ],
)
def test_one_wrong_import_breaks_a_contract(
    tmp_path: Path, module: str, line: str, contract: str
) -> None:
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "samples")
        shutil.copytree(PROJECT / package, tmp_path / package, ignore=ignored)
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    found = lint(tmp_path)
    broken = [row for row in found.stdout.splitlines() if " BROKEN" in row]
    assert found.returncode != 0
    assert any(row.startswith(contract) for row in broken), found.stdout


def test_contracts_hold() -> None:
    found = lint(PROJECT)
    assert found.returncode == 0, found.stdout


def test_nothing_but_the_command_line_looks_up() -> None:
    tree = ast.parse((PROJECT / "chatllama" / "cli.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = imports(ast.Module(body=[*top], type_ignores=[]))
    assert not [name for name in names if name.partition(".")[0] in ("data", "trainers")]


def test_packages_say_what_they_are_for_and_import_nothing() -> None:
    for path in (PROJECT / package for package in PACKAGES):
        for init in path.rglob("__init__.py"):
            tree = ast.parse(init.read_text(encoding="utf-8"))
            if where(init) != "chatllama/__init__.py":  # whose public functions come lazily
                assert imports(tree) == set(), where(init)
            assert ast.get_docstring(tree), where(init)
        for folder in {module.parent for module in path.rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), where(folder)


def test_trl_only_packs() -> None:
    users = [path for path in modules() if any(n.split(".")[0] == "trl" for n in imported(path))]
    assert [where(path) for path in users] == [TRL]


def test_no_folder_has_more_than_fifteen_entries() -> None:
    for package in PACKAGES:
        for folder in [PROJECT / package, *(PROJECT / package).rglob("*/")]:
            if "__pycache__" not in folder.parts and "samples" not in folder.parts:
                shown = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
                assert len(shown) <= 15, where(folder)
