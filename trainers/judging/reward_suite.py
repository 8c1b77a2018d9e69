"""`chatllama eval RUN --suite reward`: how often reward models order labelled pairs as people do.

Files are read by `data/reading`, statistics are those of the reward stage's diagnosis.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from chatllama.inference.evaluation.cli import SuiteOptions
from chatllama.inference.folders import is_run
from chatllama.runs.folder import RunFolder
from chatllama.runtime.command_line import tell
from chatllama.runtime.files import write_json
from data.batches import AnswerPairs, answer_pairs
from data.reading.source import decode_source, read_source
from trainers.functions.sample import Sample
from trainers.judging.reward_model import open_reward_model
from trainers.judging.rewardbench import SUBSETS, section_scores
from trainers.judging.sources import data_source
from trainers.judging.win_rate import clustered, numbered, resampled
from trainers.reward.diagnosis.calibration import agreement, calibration, proportion, weighted_mean
from trainers.reward.diagnosis.length import about_length

CATEGORIES = ("category", "subset")
"""Columns that name the kind of a record, the first that is there."""

NO_PAIRS = {"value": 0.5, "low": 0.0, "high": 1.0}
"""The proportion of no draws."""


@dataclass(frozen=True)
class Labelled:
    """Records of a preference file."""

    rows: list[dict[str, Any]]
    """Prompt, answers, ranks, ratings, key and place, as `read_source` gives them."""
    categories: list[str]
    """Of each row: its column `category` or `subset`, else its file where there are several."""
    left_out: dict[str, int]
    """Number of records by reason; labelled ties are among them."""


def evaluate_reward(place: str | Path, options: SuiteOptions) -> dict[str, Any]:
    """Measures the reward models, prints the table and writes RUN/benchmarks/reward/FILE.json.

    Of a plain model it goes to runs/NAME/benchmarks. All models are measured on the pairs that each
    of them can read.

    Raises:
        ValueError: no such file or model, or no usable pair.
    """
    if options.data is None:
        raise ValueError("--suite reward needs --data FILE, a file of pairs")
    file = str(options.data)
    data = read_labelled(file, options.limit)
    samples = [
        Sample(row["prompt"][-1]["content"], answer, list(row["prompt"]), row["where"], {})
        for row in data.rows
        for answer in row["answers"]
    ]
    scores: dict[str, list[float | None]] = {}
    folder: Path | None = None
    for each in dict.fromkeys([str(place), *options.beside]):
        model = open_reward_model(each, options, options.batch_size)  # one in memory at a time
        folder = folder or _folder(model.run)
        tell(f"{each}: {len(samples)} answers of {len(data.rows)} records")
        scores[each] = model.scores(samples)
    found = measure(data, scores)
    assert folder is not None
    path = folder / f"{_stem(data_source(file).path)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"file": file, "limit": options.limit, "left_out": data.left_out, **found}
    write_json(path, content)
    print("\n".join(table(content)))
    print(f"written: {path}")
    return content


def _folder(run: RunFolder) -> Path:
    root = run.root if is_run(run) else Path("runs") / run.root.name
    return root / "benchmarks" / "reward"


def _stem(file: str) -> str:
    """A name for the results of a file, a folder, a pattern or a hub id."""
    parts = [part for part in Path(file).parts if part not in ("/", ".", "..") and "*" not in part]
    return "-".join(parts[-2:]).split(".")[0] or "data"


def read_labelled(file: str, limit: int | None = None) -> Labelled:
    """The usable records of preference data in any format, the first `limit` of them.

    Raises:
        ValueError: there is no such data, it is malformed, or most of it is of no use.
    """
    datasets.disable_progress_bars()
    source = data_source(file)
    records, report = read_source(source, "preferences")
    tell(report.summary())
    rows = records.to_list()[:limit]
    of_object = {where: raw for where, raw in decode_source(source) if isinstance(raw, dict)}
    files = {row["where"].rsplit(":", 1)[0] for row in rows}
    names = _short(sorted(files))
    categories = []
    for row in rows:
        where = row["where"]
        raw = of_object.get(where) or of_object.get(where.rsplit(" (", 1)[0], {})
        named = next((raw[key] for key in CATEGORIES if isinstance(raw.get(key), str)), None)
        categories.append(named or names[where.rsplit(":", 1)[0]])
    return Labelled(rows, categories, report.left_out)


def _short(files: Sequence[str]) -> dict[str, str]:
    """Each file by the part of its path that tells it from the others; "" for one alone."""
    if len(files) < 2:
        return dict.fromkeys(files, "")
    parts = {file: Path(file).with_suffix("").parts for file in files}
    columns = list(zip(*(own[::-1] for own in parts.values()), strict=False))
    place = next((i for i, names in enumerate(columns) if len(set(names)) == len(files)), 0)
    return {file: own[::-1][place] for file, own in parts.items()}


def measure(data: Labelled, scores: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Findings on each model, on the records of which all can read every answer.

    Args:
        data: N answers, record by record.
        scores: model -> N scores; None: too long for it.

    Raises:
        ValueError: no record is left.
    """
    firsts = np.cumsum([0, *(len(row["answers"]) for row in data.rows)])
    readable = [
        all(None not in own[first:last] for own in scores.values())
        for first, last in pairwise(firsts)
    ]
    if not any(readable):
        raise ValueError(f"all {len(data.rows)} records are longer than the reward model reads")
    rows = [row for row, kept in zip(data.rows, readable, strict=True) if kept]
    kept_answers = np.repeat(readable, np.diff(firsts))
    pairs = answer_pairs(rows)
    of_record = pairs.prompt.numpy()
    kinds = [kind for kind, kept in zip(data.categories, readable, strict=True) if kept]
    shared = {
        "pairs": pairs,
        "clusters": numbered([rows[i]["key"] for i in of_record]),
        "categories": np.array([kinds[i] for i in of_record], dtype=object),
        "lengths": np.array([len(answer) for row in rows for answer in row["answers"]]),
    }
    values = {name: np.array(own, dtype=float)[kept_answers] for name, own in scores.items()}
    found: dict[str, Any] = {
        "records": len(rows),
        "pairs": len(of_record),
        "prompts": int(shared["clusters"].max()) + 1,
        "too_long": len(data.rows) - len(rows),
        "models": {name: _about(own, **shared) for name, own in values.items()},
    }
    first, *others = values
    better, worse = pairs.better.numpy(), pairs.worse.numpy()
    agreed = {name: agreement(own[better] - own[worse]) for name, own in values.items()}
    weights = np.asarray(pairs.weight, dtype=float)
    found["paired"] = {
        other: _difference(agreed[other] - agreed[first], weights, shared["clusters"])
        for other in others
    }
    return found


def _difference(each: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Weighted mean with the 95 % interval of a bootstrap over prompts."""
    draws = resampled(clusters) * weights
    low, high = np.quantile(draws @ each / draws.sum(1), (0.025, 0.975))
    return {"value": weighted_mean(each, weights), "low": float(low), "high": float(high)}


def _about(
    scores: np.ndarray,
    pairs: AnswerPairs,
    clusters: np.ndarray,
    categories: np.ndarray,
    lengths: np.ndarray,
) -> dict[str, Any]:
    """Accuracy, per category, by length, ties and calibration of one model."""
    better, worse = pairs.better.numpy(), pairs.worse.numpy()
    gaps = scores[better] - scores[worse]
    weights = np.asarray(pairs.weight, dtype=float)
    counted = clustered(weights, clusters)
    found: dict[str, Any] = {
        "accuracy": asdict(proportion(agreement(gaps), counted)),
        "ties": weighted_mean((gaps == 0).astype(float), weights),
        "length": about_length(lengths, scores, better, worse, counted),
        "calibration": calibration(gaps, counted),
        "categories": {},
    }
    names = sorted(set(categories.tolist()))
    for name in names if len(names) > 1 else ():
        inside = categories == name
        own = clustered(weights[inside], numbered(clusters[inside].tolist()))
        accuracy = asdict(proportion(agreement(gaps[inside]), own))
        found["categories"][name] = {**accuracy, "records": round(float(weights[inside].sum()))}
    if SUBSETS & set(names):
        sections = section_scores(gaps, weights, categories, clusters)
        found["rewardbench"] = {name: asdict(value) for name, value in sections.items()}
    return found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The results as lines of a terminal, in percent."""
    counts = f"{found['pairs']} pairs of {found['records']} records, {found['prompts']} prompts"
    longer = f"; {found['too_long']} records are too long" if found["too_long"] else ""
    yield f"{found['file']}: {counts}{longer}"
    models: Mapping[str, Any] = found["models"]
    rows: list[tuple[str, list[str]]] = [("", ["/".join(Path(m).parts[-2:]) for m in models])]

    def add(label: str, cells: Sequence[str]) -> None:
        rows.append((label, list(cells)))

    own = list(models.values())
    add("accuracy", [_percent(m["accuracy"]) for m in own])
    lengths = [m["length"] for m in own]
    sides = ("better_is_longer", "better_is_shorter")
    both = [all(each[side] != NO_PAIRS for side in sides) for each in lengths]
    add("  length-controlled",
        [_percent(each["controlled_accuracy"]) if ok else "-"
         for each, ok in zip(lengths, both, strict=True)])  # fmt: skip
    for side in sides:
        cells = ["-" if each[side] == NO_PAIRS else _percent(each[side]) for each in lengths]
        add(f"  preferred one is {side.rpartition('_')[2]}", cells)
    add("equal scores", [f"{100 * m['ties']:.1f}" for m in own])
    add("calibration error", [f"{m['calibration']['error']:.3f}" for m in own])
    for name, first in own[0]["categories"].items():
        cells = [_percent(m["categories"][name]) for m in own]
        add(f"{name} ({first['records']})", cells)
    for name in own[0].get("rewardbench", {}):
        add(f"RewardBench: {name}", [_percent(m["rewardbench"][name]) for m in own])
    label = max(len(row[0]) for row in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    for name, cells in rows:
        yield f"{name:<{label}}  " + "  ".join(f"{cell:>{width}}" for cell in cells)
    first = next(iter(models))
    for name, value in found["paired"].items():
        yield f"accuracy of {name} less that of {first}: {_percent(value, '+.1f')}"


def _percent(found: Mapping[str, float], form: str = ".1f") -> str:
    value, low, high = (format(100 * found[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
