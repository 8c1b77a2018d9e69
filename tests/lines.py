"""`make lines`: lines of Python per package, and the limits on files, folders and the whole.

Ends with code 1 where a limit is exceeded; with `--report` it only prints.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("chatllama", "data", "trainers")
SCRIPTS = ("train_sft.py", "train_rm.py", "train_ppo.py")
FILE, FUNCTION, SCRIPT, ENTRIES, READING = 350, 60, 50, 15, 3_500
# 26,500 for the features of version 0.1; what a later change adds, it says in CHANGELOG.
TOTAL = 43_600


def count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def modules(folder: Path) -> list[Path]:
    """Every Python file below a folder; a file alone is itself."""
    return [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def reading_path(project: Path) -> list[Path]:
    """The Python files that README's "Read it" names in its first paragraph, in its order.

    As files, as folders (`data/`), or several of a folder (`trainers/ppo/{rollout,update}.py`).
    """
    readme = (project / "README.md").read_text(encoding="utf-8")
    paragraph = readme.partition("\n## Read it\n")[2].strip().partition("\n\n")[0]
    found: list[Path] = []
    for name in re.findall(r"`([\w/{},]+(?:\.py|/))`", paragraph):
        before, _, rest = name.partition("{")
        inner, _, after = rest.partition("}")
        for part in inner.split(","):
            found += modules(project / f"{before}{part}{after}")
    return found


def shown(folder: Path) -> set[str]:
    """The entries that a listing of a package shows, without `__init__.py` and caches."""
    return {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}


def folders(project: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for folder in [project / package, *sorted((project / package).rglob("*/"))]:
            if "__pycache__" not in folder.parts and "samples" not in folder.parts:
                yield folder


def long_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (length := node.end_lineno - node.lineno + 1) > FUNCTION:
                yield node.name, length


def table(project: Path) -> list[tuple[str, int]]:
    """Lines of every package, of the scripts, of all, and of the reading path."""
    rows: list[tuple[str, int]] = []
    for package in PACKAGES:
        inner = [path for path in sorted((project / package).iterdir()) if path.is_dir()]
        inner = [path for path in inner if modules(path)]
        alone = sum(count(path) for path in sorted((project / package).glob("*.py")))
        rows += [(f"{package}/{path.name}", sum(map(count, modules(path)))) for path in inner]
        rows.append((f"{package}/*.py", alone))
    rows.append(("scripts", sum(count(project / name) for name in SCRIPTS)))
    rows.append(("all", sum(lines for _, lines in rows)))
    rows.append(("reading path", sum(map(count, reading_path(project)))))
    return rows


def excesses(project: Path) -> list[str]:
    """What is over its limit, one sentence each."""
    found: list[str] = []

    def check(what: str, lines: int, limit: int, unit: str = "lines") -> None:
        if lines > limit:
            found.append(f"{what}: {lines:,} {unit}, at most {limit:,}")

    for path in (path for package in PACKAGES for path in modules(project / package)):
        name = path.relative_to(project).as_posix()
        check(name, count(path), FILE)
        for function, length in long_functions(path):
            check(f"{name}: {function}", length, FUNCTION)
    for name in SCRIPTS:
        check(name, count(project / name), SCRIPT)
    for folder in folders(project):
        check(f"{folder.relative_to(project)}/", len(shown(folder)), ENTRIES, "entries")
    sums = dict(table(project))
    check("all packages and scripts", sums["all"], TOTAL)
    check('the reading path of README\'s "Read it"', sums["reading path"], READING)
    return found


def main(project: Path = PROJECT, report_only: bool = False) -> int:
    for name, lines in table(project):
        print(f"{lines:7,}  {name}")
    found = excesses(project)
    print(*found, sep="\n", file=sys.stderr)
    return int(bool(found) and not report_only)


if __name__ == "__main__":
    sys.exit(main(report_only="--report" in sys.argv[1:]))
