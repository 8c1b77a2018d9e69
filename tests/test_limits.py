"""`make lines` and the CPU budget of `make unit` can fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import lines
import pytest

PATH = "First `data/`, then `train_{sft,rm}.py`; `make unit`."
README = f"# x\n\n## Read it\n\n{PATH}\n\nLast `trainers/`.\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The smallest project: 1 + 2 + 1 lines in packages, 2 lines in each script."""
    for name, text in (
        ("chatllama/__init__.py", '"""a"""\n'),
        ("data/reading/__init__.py", '"""b"""\n\n'),
        ("trainers/__init__.py", '"""c"""\n'),
        *((script, "import data\n\n") for script in lines.SCRIPTS),
        ("README.md", README),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_lines_are_counted_per_package_and_along_the_reading_path(project: Path) -> None:
    assert dict(lines.table(project)) == {
        "chatllama/*.py": 1,
        "data/reading": 2,
        "data/*.py": 0,
        "trainers/*.py": 1,
        "scripts": 6,
        "all": 10,
        "reading path": 6,  # data/reading/__init__.py and two scripts, not trainers/
    }
    assert lines.main(project) == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data/long.py", "x = 1\n" * 351, "data/long.py: 351 lines, at most 350"),
        ("train_rm.py", "x = 1\n" * 51, "train_rm.py: 51 lines, at most 50"),
        ("data/f.py", "def f():\n" + "    x = 1\n" * 60, "data/f.py: f: 61 lines, at most 60"),
    ],
)
def test_a_long_file_script_or_function_is_named(
    project: Path, file: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / file).write_text(text)
    assert lines.excesses(project) == [message]
    assert lines.main(project) == 1 and message in capsys.readouterr().err
    assert lines.main(project, report_only=True) == 0


def test_a_full_folder_is_named(project: Path) -> None:
    for number in range(15):
        (project / "trainers" / f"m{number}.py").touch()
    (project / "trainers" / "__pycache__").mkdir()
    assert lines.excesses(project) == []
    (project / "trainers" / "page.css").touch()
    assert lines.excesses(project) == ["trainers/: 16 entries, at most 15"]


def test_the_whole_and_the_reading_path_have_limits(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "TOTAL", 9)
    monkeypatch.setattr(lines, "READING", 3)
    whole, reading = lines.excesses(project)
    assert whole == "all packages and scripts: 10 lines, at most 9"
    assert reading.endswith(": 6 lines, at most 3")


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "code"), [(1.0, 1), (600.0, 0)])
def test_the_budget_counts_the_processes_that_tests_start(
    tmp_path: Path, budget: float, code: int
) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys\n"
        "busy = 'import time\\nwhile time.process_time() < 3: pass'\n"
        "def test_it(): subprocess.run([sys.executable, '-c', busy])\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", f"--cpu-budget={budget}", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    said = "OVER the budget of 1: make" if code else "within the budget of 600"
    assert said in done.stdout
    assert int(done.stdout.partition(" CPU seconds, ")[0].split()[-1]) >= 3
