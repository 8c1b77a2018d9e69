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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import launcher
from parallelism_cells import PROJECT, STAGES, Cell, cells, prepare, reference_name

ZEROS = (0, 1, 2, 3)
NOT_AT_ZERO_0 = {"sft/grad_norm"}
"""DeepSpeed tells the Trainer no gradient norm at stage 0 (it clips all the same)."""
WORKER = Path(__file__).with_name("parallelism_cells.py")
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of a metric, relative where it is above 1 and absolute below."""
TEXT = Path(__file__).with_name("parallelism_text.md")
"""The words of the page."""


@dataclass(frozen=True)
class Deviation:
    """How far one cell on some ranks is from one process."""

    ranks: int
    zero: int
    cell: Cell
    off: dict[str, float]
    """Stage -> the largest deviation of its metrics; empty where the cell has not been run."""

    @property
    def largest(self) -> float:
        """Over the stages."""
        return max(self.off.values(), default=0.0)

    @property
    def tolerated(self) -> bool:
        """Whether it is within the tolerance."""
        return self.largest <= TOLERANCES[self.cell.dtype]


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
        _run(folder, folder / "one-3.jsonl", 3, 1, arguments.ranks)
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
    alone, under_zero3 = _read(folder / "one.jsonl"), _read(folder / "one-3.jsonl")
    found = []
    for ranks in all_ranks:
        for zero in ZEROS:
            results = _read(folder / f"{ranks}-{zero}.jsonl")
            for cell in cells(zero, ranks):
                if cell.name not in results:
                    found.append(Deviation(ranks, zero, cell, {}))
                    continue
                same_sums = under_zero3 if zero == 3 and cell.dtype == "bfloat16" else alone
                expected = same_sums[reference_name(cell, cell.microbatch_size(ranks))]
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


def page(found: Sequence[Deviation], ranks: Sequence[int], setting: str) -> str:
    """The whole page.

    Args:
        found: all cells.
        ranks: the numbers of ranks among them.
        setting: day, versions and machine.
    """
    outside = sum(not each.tolerated for each in found)
    run = sum(bool(each.off) for each in found)
    verdict = f"{run} of {len(found)} cells have been run, "
    verdict += f"**{outside} are outside**" if outside else "all of them are within"
    tables = [_by_stage(found)]
    tables += [_by_cell([each for each in found if each.ranks == count], count) for count in ranks]
    text = TEXT.read_text(encoding="utf-8")
    return text.format(
        setting=setting, verdict=verdict, tables="\n".join(tables).rstrip(), **TOLERANCES
    )


def _by_stage(found: Sequence[Deviation]) -> str:
    """The largest deviation by stage of training."""
    lines = [
        "## By stage of training",
        "",
        "| weights | dtype | cells | SFT | reward | PPO |",
        "|---|---|---|---|---|---|",
    ]
    for weights in ("LoRA", "full"):
        for dtype in TOLERANCES:
            group = [e for e in found if (e.cell.weights, e.cell.dtype) == (weights, dtype)]
            tops = [_largest(group, lambda e, s=stage: e.off.get(s)) for stage in STAGES]
            run = sum(bool(each.off) for each in group)
            lines.append(f"| {weights} | {dtype} | {run} | {' | '.join(tops)} |")
    return "\n".join(lines) + "\n"


def _by_cell(found: Sequence[Deviation], ranks: int) -> str:
    """One number per cell: rows of settings, columns of ZeRO stages and offloading."""
    columns = list(dict.fromkeys((e.zero, e.cell.offload) for e in found))
    heads = [f"{zero}" if place == "none" else f"{zero}, {place}" for zero, place in columns]
    lines = [
        f"## {ranks} ranks",
        "",
        "Columns: ZeRO stage, and what is offloaded to the CPU (optimizer, parameters, both).",
        "",
        f"| weights | dtype | accumulation | checkpointing | {' | '.join(heads)} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    rows: dict[tuple, dict] = {}
    for each in found:
        cell = each.cell
        row = (cell.weights, cell.dtype, cell.accumulates, cell.checkpointing)
        rows.setdefault(row, {})[each.zero, cell.offload] = each
    for (weights, dtype, accumulates, checkpointing), columns_found in rows.items():
        words = [weights, dtype, "yes" if accumulates else "no", "yes" if checkpointing else "no"]
        words += [_shown(columns_found[column]) for column in columns]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def _shown(deviation: Deviation) -> str:
    if not deviation.off:
        return "not run"
    text = f"{deviation.largest:.0e}"
    return text if deviation.tolerated else f"**{text}**"


def _largest(found: Sequence[Deviation], value: Callable[[Deviation], float | None]) -> str:
    numbers = [number for each in found if (number := value(each)) is not None]
    return f"{max(numbers):.1e}" if numbers else "-"


if __name__ == "__main__":
    main()
