"""Does the number of processes, the ZeRO stage or offloading change what is learnt?

    python benchmarks/parallelism.py [--ranks 2 4] [--folder FOLDER] [--page docs/parallelism.md]

Runs every cell of `parallelism_cells.py` on the CPU through the deepspeed launcher, compares every
metric that the stages log with those of one process, and writes the page. Nothing is downloaded.
An interrupted run goes on where it stopped when it is given the same --folder.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring import launcher
from parallelism_cells import PROJECT, cells, prepare, reference_name
from parallelism_page import Deviation, page

ZEROS = (0, 1, 2, 3)
NOT_AT_ZERO_0 = {"sft/grad_norm"}
"""DeepSpeed tells the Trainer no gradient norm at stage 0 (it clips all the same)."""
WORKER = Path(__file__).with_name("parallelism_cells.py")


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", type=Path, help="for models, data and results")
    parser.add_argument("--page", type=Path, default=PROJECT / "docs" / "parallelism.md")
    parser.add_argument("--only-page", action="store_true", help="from what has been run so far")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.only_page:
        if not (folder / "config.yaml").is_file():
            prepare(folder)
        print(f"results are in {folder}", flush=True)
        _run(folder, folder / "one.jsonl", 0, None, arguments.ranks)
        for ranks in arguments.ranks:
            for zero in ZEROS:
                _run(folder, folder / f"{ranks}-{zero}.jsonl", zero, ranks, arguments.ranks)
    text = page(deviations(folder, arguments.ranks), arguments.ranks, _setting())
    arguments.page.write_text(text, encoding="utf-8")
    print(f"wrote {arguments.page}")


def _run(folder: Path, results: Path, zero: int, ranks: int | None, all_ranks: list[int]) -> None:
    """Runs the worker once; a cell that fails ends the benchmark with its own output."""
    command = [sys.executable] if ranks is None else launcher(ranks)
    command += [str(WORKER), str(folder), str(results), str(zero), *map(str, all_ranks)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PROJECT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with results.with_suffix(".log").open("a") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"exit code {code}: see {log.name}")


def deviations(folder: Path, all_ranks: Sequence[int]) -> list[Deviation]:
    """How far each cell is from one process."""
    alone = _read(folder / "one.jsonl")
    found = []
    for ranks in all_ranks:
        for zero in ZEROS:
            results = _read(folder / f"{ranks}-{zero}.jsonl")
            for cell in cells(zero, ranks):
                if cell.name not in results:
                    found.append(Deviation(ranks, zero, cell, {}))
                    continue
                expected = alone[reference_name(cell, cell.microbatch_size(ranks))]
                off = {s: _deviation(results[cell.name][s], expected[s]) for s in cell.stages}
                found.append(Deviation(ranks, zero, cell, off))
    return found


def _read(path: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["cell"]: line["metrics"] for line in lines}


def _deviation(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """The largest of |found - expected| / max(1, |expected|) over steps and metrics."""
    largest = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.keys() - mine.keys() <= NOT_AT_ZERO_0 and mine.keys() <= theirs.keys()
        for name, value in mine.items():
            largest = max(largest, abs(value - theirs[name]) / max(1.0, abs(theirs[name])))
    return largest


def _setting() -> str:
    """The day, the versions and the machine, in one sentence."""
    names = ("torch", "deepspeed", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    day = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        f"{day}, Python {platform.python_version()}, {versions}; {os.cpu_count()} CPU cores "
        f"({platform.machine()}), gloo, one thread per rank"
    )


if __name__ == "__main__":
    main()
