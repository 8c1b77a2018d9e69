"""Suites of lm-eval tasks, published results beside which ours are printed, and local data sets.

Tasks, prompts and metrics are lm-eval's own; only where their records come from may differ.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

MMLU_GROUPS = ("humanities", "stem", "social_sciences", "other")
SPLITS = ("train", "validation", "dev", "test")
_LETTERS = "ABCD"
_FRAGMENT = re.compile(r"^(.*[.!?\"')\]]) ([a-z].*)$", re.DOTALL)


@dataclass(frozen=True)
class Suite:
    """Tasks that belong together."""

    tasks: tuple[str, ...]
    """Names of lm-eval: tasks, or tags that stand for several."""
    shots: int | None = None
    """Examples before each question. None: as many as the task itself says."""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Results of others in percent: model -> column -> value."""


_EIGHT = (
    "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
    "openbookqa",
)  # fmt: skip


def _rows(columns: Sequence[str], **rows: Sequence[float]) -> dict[str, dict[str, float]]:
    """Percentages by size of the model and column."""
    return {
        f"LLaMA {size.strip('_')}": dict(zip(columns, row, strict=True))
        for size, row in rows.items()
    }


SUITES: dict[str, Suite] = {
    "mmlu": Suite(
        tuple(f"mmlu_{group}_tasks" for group in MMLU_GROUPS),
        shots=5,
        published=_rows(
            (*MMLU_GROUPS, "average"),
            _7B=(34.0, 30.5, 38.3, 38.1, 35.1),
            _13B=(45.0, 35.8, 53.8, 53.3, 46.9),
            _33B=(55.8, 46.0, 66.7, 63.4, 57.8),
            _65B=(61.8, 51.7, 72.9, 67.4, 63.4),
        )
        | {"LLaMA-I 65B": {"average": 68.9}},
    ),
    "commonsense": Suite(
        _EIGHT,
        shots=0,
        published=_rows(
            _EIGHT,
            _7B=(76.5, 79.8, 48.9, 76.1, 70.1, 72.8, 47.6, 57.2),
            _13B=(78.1, 80.1, 50.4, 79.2, 73.0, 74.8, 52.7, 56.4),
            _33B=(83.1, 82.3, 50.4, 82.8, 76.0, 80.0, 57.8, 58.6),
            _65B=(85.3, 82.8, 52.3, 84.2, 77.0, 78.9, 56.0, 60.2),
        ),
    ),
    "hellaswag": Suite(("hellaswag",), shots=0),
    "ifeval": Suite(("ifeval",), shots=0),
}
"""Published: Touvron 2023 (arXiv 2302.13971), tables 9, 3 and 10, zero-shot but for MMLU's 5."""


def find_suite(name: str, shots: int | None) -> Suite:
    """A suite by its name, or tasks of lm-eval by theirs, separated by commas."""
    suite = SUITES.get(name) or Suite(tuple(part.strip() for part in name.split(",")))
    if shots not in (None, suite.shots):
        return Suite(suite.tasks, shots)  # what is published was measured otherwise
    return suite


def local_records(task: str, folder: Path) -> Callable[..., dict[str, Dataset]]:
    """What gives a task's records from files of `folder`, by split.

    Read are the original files of MMLU (`test/anatomy_test.csv`, `dev/anatomy_dev.csv`) and of
    HellaSwag (`hellaswag_val*.jsonl`), and for any task `TASK/SPLIT.jsonl`, `.csv` or `.parquet`
    with the columns that the task has on the hub.

    Raises:
        ValueError: the folder has none of them.
    """
    subject = task.removeprefix("mmlu_")
    csvs = {split: folder / split / f"{subject}_{split}.csv" for split in ("dev", "test")}
    if subject != task and all(path.is_file() for path in csvs.values()):
        return lambda **_: {split: _mmlu(path) for split, path in csvs.items()}
    if task == "hellaswag" and (files := sorted(folder.glob("hellaswag_val*.jsonl"))):
        return lambda **_: {"train": _hellaswag(files), "validation": _hellaswag(files)}
    found = {
        split: path
        for split in SPLITS
        for path in sorted((folder / task).glob(f"{split}.*"))
        if path.suffix in (".jsonl", ".csv", ".parquet")
    }
    if not found:
        raise ValueError(f"--data {folder}: no records of {task} there (docs/evaluation.md)")
    return lambda **_: {split: _plain(path) for split, path in found.items()}


def _mmlu(path: Path) -> Dataset:
    """Hendrycks' csv, without a header: question, four choices, the letter of the right one."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) != 6 or row[5] not in tuple(_LETTERS):
                raise ValueError(
                    f"{path}:{number}: expected question, four choices and a letter of A to D, "
                    f"not {len(row)} cells ending with {row[-1:]}"
                )
            answer = _LETTERS.index(row[5])
            rows.append({"question": row[0], "choices": row[1:5], "answer": answer})
    return Dataset.from_list(rows)


def _hellaswag(files: list[Path]) -> Dataset:
    """Zellers' jsonl. Where the context is whole, its last, lower-case fragment is `ctx_b`."""
    data = load_dataset("json", data_files=[str(path) for path in files], split="train")
    assert isinstance(data, Dataset)
    if "ctx_a" in data.column_names:
        return data

    def parts(record: dict[str, Any]) -> dict[str, str]:
        split = _FRAGMENT.match(record["ctx"])
        return {"ctx_a": split[1], "ctx_b": split[2]} if split else {
            "ctx_a": record["ctx"], "ctx_b": ""
        }  # fmt: skip

    return data.map(parts)


def _plain(path: Path) -> Dataset:
    """A file with the hub's columns."""
    kind = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}[path.suffix]
    data = load_dataset(kind, data_files=str(path), split="train")
    assert isinstance(data, Dataset)
    return data
