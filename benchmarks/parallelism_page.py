"""The page docs/parallelism.md from what the cells of `parallelism_cells.py` measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallelism_cells import STAGES, Cell

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
    for (weights, dtype, accumulates, checkpointing), cells in rows.items():
        words = [weights, dtype, "yes" if accumulates else "no", "yes" if checkpointing else "no"]
        words += [_shown(cells[column]) for column in columns]
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
