"""The rooms and doors of the code base: which module may import what."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
DATA_MAY_USE = {"chatllama.chat_format", "chatllama.tokenizer", "chatllama.config"}
ONLY_IN = {
    "deepspeed": {"trainers/engine.py"},
    "trl": {"trainers/sft.py", "trainers/instruction_trainer.py", "trainers/reward.py"},
}
# Pure arithmetic.
TORCH_ONLY = ("trainers/ppo_math.py", "trainers/losses.py")


def modules() -> list[Path]:
    return [p for room in ("chatllama", "data", "trainers") for p in (PROJECT / room).rglob("*.py")]


def imports(tree: ast.AST) -> set[str]:
    """Dotted names imported anywhere below `tree`; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str:
    return name.partition(".")[0]


def violations(where: str, tree: ast.Module) -> list[str]:
    """What the module at `where` (from the project root) imports against the rules."""
    found: list[str] = []
    room = room_of(where.replace("/", "."))
    names = imports(tree)
    if where == "chatllama/cli.py":  # may import upwards, inside functions
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = imports(ast.Module(body=[*top], type_ignores=[]))
    for name in sorted(names):
        if room == "chatllama" and room_of(name) in ("trainers", "data"):
            found.append(name)
        if room == "data" and room_of(name) == "trainers":
            found.append(name)
        allowed = any(name == each or name.startswith(each + ".") for each in DATA_MAY_USE)
        is_module = (PROJECT / Path(*name.split("."))).with_suffix(".py").is_file()
        if room == "data" and room_of(name) == "chatllama" and is_module and not allowed:
            found.append(name)
        if where not in ONLY_IN.get(room_of(name), {where}):
            found.append(name)
        if where in TORCH_ONLY and room_of(name) in ("chatllama", "data", "trainers", "peft"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PROJECT)))
def test_imports_go_down_only(path: Path) -> None:
    where = path.relative_to(PROJECT).as_posix()
    assert violations(where, ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("chatllama/x.py", "import trainers.ppo"),
        ("chatllama/x.py", "def f():\n    from data import readers"),
        ("chatllama/cli.py", "from trainers import ppo"),
        ("data/x.py", "from chatllama import roles"),
        ("data/x.py", "from chatllama.roles import acting_as"),
        ("trainers/ppo.py", "import deepspeed.zero"),
        ("trainers/ppo.py", "from trl import SFTTrainer"),
        ("trainers/losses.py", "from chatllama import config"),
    ],
)
def test_the_rules_can_fail(where: str, source: str) -> None:
    assert violations(where, ast.parse(source)) != []


def test_command_line_may_import_upwards_inside_functions() -> None:
    tree = ast.parse("def run():\n    from trainers import ppo")
    assert violations("chatllama/cli.py", tree) == []


@pytest.mark.parametrize("room", ["chatllama", "data", "trainers"])
def test_package_init_imports_nothing(room: str) -> None:
    tree = ast.parse((PROJECT / room / "__init__.py").read_text(encoding="utf-8"))
    assert imports(tree) == set()
