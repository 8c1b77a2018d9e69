"""Plants every bug of the catalogue in a copy of the project: each named test must see it.

    python tests/mutations/run.py [NAME ...] [--jobs N]

A NAME is part of a mutation's name. The heavy libraries are imported once, before a process is
forked for each mutation; the project's own modules are imported from the mutated copy alone.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from catalogue import MUTATIONS
from mutation import Mutation

PROJECT = Path(__file__).resolve().parent.parent.parent
COPIED = ("chatllama", "trainers", "data", "configs", "tests", "pyproject.toml")
SCRIPTS = ("train_sft.py", "train_rm.py", "train_ppo.py")
TIME_LIMIT = 180
"""Seconds for the tests of one mutation."""


@dataclass(frozen=True)
class Verdict:
    """What the tests said about one mutation, or about the project as it is (name None)."""

    name: str | None
    seconds: float
    failed: tuple[str, ...] = ()
    """Tests, as they were named, that failed."""
    passed: tuple[str, ...] = ()
    trouble: str = ""
    """Why this is no verdict: the tests did not run."""


def main(argv: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS) -> int:
    """0 where every chosen mutation is caught by each of its tests.

    Args:
        argv: the arguments. None: this process's.
        mutations: to choose from.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="parts of names (default: all mutations)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    chosen = [m for m in mutations if _matches(m, arguments.names)]
    if not chosen:
        parser.error(f"no mutation is called {' or '.join(arguments.names)}")
    for mutation in chosen:
        patched(mutation)
    started = time.monotonic()
    _import_libraries()
    tests = sorted({test for mutation in chosen for test in mutation.catchers})
    tasks = [(None, tuple(tests[i :: arguments.jobs])) for i in range(arguments.jobs)]
    tasks += [(mutation, mutation.catchers) for mutation in chosen]
    verdicts = []
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for verdict in pool.imap(_judge, tasks, chunksize=1):
            if verdict.name is not None:
                print(_line(verdict), flush=True)
            verdicts.append(verdict)
    bad = [verdict for verdict in verdicts if not _is_caught(verdict)]
    caught = len(chosen) - sum(verdict.name is not None for verdict in bad)
    for verdict in bad:
        print(f"\n{_complaint(verdict)}")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\n{caught} of {len(chosen)} mutations caught in {minutes} min {seconds:02d} s")
    return 1 if bad else 0


def patched(mutation: Mutation) -> str:
    """The text of the mutated file.

    Raises:
        SystemExit: the line is not there, or more than once: the catalogue must follow the code.
    """
    text = (PROJECT / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise SystemExit(
            f"mutation {mutation.name!r}: {mutation.file} holds {count} times, not once:\n"
            f"    {mutation.old}\nThe code has changed; change tests/mutations/catalogue.py too."
        )
    assert "\n" not in mutation.old + mutation.new, mutation.name
    return text.replace(mutation.old, mutation.new)


def _matches(mutation: Mutation, names: list[str]) -> bool:
    return not names or any(name in mutation.name for name in names)


def _import_libraries() -> None:
    """What takes long to import and is not ours, so that the forked processes share it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.dont_write_bytecode = True
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import rich.progress  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl  # noqa: F401


def _judge(task: tuple[Mutation | None, tuple[str, ...]]) -> Verdict:
    """Runs in a process of its own: tests against a copy of the project with one line changed."""
    mutation, tests = task
    name = mutation.name if mutation is not None else None
    started = time.monotonic()
    signal.signal(signal.SIGALRM, _out_of_time)
    folder = Path(tempfile.mkdtemp(prefix="chatllama-mutation-"))
    failed: list[str] = []
    passed: list[str] = []
    output = io.StringIO()
    try:
        _copy_project(folder)
        if mutation is not None:
            (folder / mutation.file).write_text(patched(mutation), encoding="utf-8")
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() != PROJECT)]
        signal.alarm(TIME_LIMIT)
        for test in tests:
            code = _run_test(test, folder, output)
            if code not in (0, 1):
                trouble = f"pytest ended with code {code}\n{output.getvalue()[-3000:]}"
                return Verdict(name, time.monotonic() - started, trouble=trouble)
            (failed if code else passed).append(test)
        _check_modules(folder)
    except TimeoutError as error:
        trouble = f"{error}\n{output.getvalue()[-3000:]}"
        return Verdict(name, time.monotonic() - started, trouble=trouble)
    finally:
        signal.alarm(0)
        os.chdir(PROJECT)
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(name, time.monotonic() - started, tuple(failed), tuple(passed))


def _run_test(test: str, folder: Path, output: io.StringIO) -> int:
    import pytest

    options = ["-x", "-q", "-m", "", "-p", "no:cacheprovider", "--tb=short"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return int(pytest.main([test, *options, f"--rootdir={folder}"]))


def _copy_project(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "samples")
    for name in (*COPIED, *SCRIPTS):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


def _check_modules(folder: Path) -> None:
    """Our own modules must have come from the copy, or nothing was proved."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("chatllama", "trainers", "data") and module.__file__:
            assert Path(module.__file__).is_relative_to(folder), module.__file__


def _out_of_time(*_: object) -> None:
    raise TimeoutError(f"not done after {TIME_LIMIT} s")


def _is_caught(verdict: Verdict) -> bool:
    if verdict.name is None:
        return not verdict.failed and not verdict.trouble
    return not verdict.passed and not verdict.trouble


def _line(verdict: Verdict) -> str:
    tests = ", ".join(test.removeprefix("tests/") for test in verdict.failed)
    mark = "caught  " if _is_caught(verdict) else "SURVIVED"
    return f"{mark} {verdict.seconds:4.0f} s  {verdict.name}\n                 {tests or '-'}"


def _complaint(verdict: Verdict) -> str:
    if verdict.trouble:
        return f"{verdict.name or 'the project as it is'}: no verdict: {verdict.trouble}"
    if verdict.name is None:
        return f"these tests fail without any mutation: {', '.join(verdict.failed)}"
    return f"SURVIVED: {verdict.name}; not seen by {', '.join(verdict.passed)}"


if __name__ == "__main__":
    raise SystemExit(main())
