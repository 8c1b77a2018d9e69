"""The catalogue of planted bugs follows the code, and every bug is seen."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent.parent
sys.path.append(str(FOLDER))

from catalogue import MUTATIONS  # noqa: E402  # pyright: ignore[reportMissingImports]
from mutation import Mutation  # noqa: E402  # pyright: ignore[reportMissingImports]
from run import patched  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_its_line_and_its_tests_exist(mutation: Mutation):
    text = (PROJECT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, mutation.old
    assert mutation.new != mutation.old and "\n" not in mutation.old + mutation.new
    assert mutation.catchers
    for catcher in mutation.catchers:
        file, _, test = catcher.partition("::")
        assert f"def {test.partition('[')[0]}(" in (PROJECT / file).read_text(encoding="utf-8")


def test_names_differ_and_so_do_bugs():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 130
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.slow
def test_every_mutation_is_caught():
    command = [sys.executable, str(FOLDER / "run.py")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(MUTATIONS)} of {len(MUTATIONS)} mutations caught" in done.stdout


@pytest.mark.slow
def test_a_change_that_no_test_sees_is_a_failure():
    harmless = Mutation(
        "harmless",
        "trainers/ppo/ppo_math.py",
        "return 1 - variance_of_error / variance_of_returns if",
        "return 1.0 - variance_of_error / variance_of_returns if",
        ("tests/ppo/test_ppo_math.py::test_explained_variance",),
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import run; from mutation import Mutation\n"
        f"sys.exit(run.main([], ({harmless!r},)))"
    )
    command = [sys.executable, "-c", code, str(FOLDER)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SURVIVED: harmless" in done.stdout and "0 of 1 mutations caught" in done.stdout


def test_a_line_that_has_gone_is_refused_by_name():
    gone = Mutation("gone", "trainers/ppo/ppo_math.py", "no such line", "x", ())
    with pytest.raises(
        SystemExit, match=r"'gone': trainers/ppo/ppo_math.py holds 0 times, not once"
    ):
        patched(gone)
