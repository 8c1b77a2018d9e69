"""Verdicts on two answers: numbers mean what the config or the whole column says, or nothing."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from chatllama.config.loader import load_config
from chatllama.config.sources import DataSource
from data.checking.check import examine
from data.reading.source import read_source

pytestmark = pytest.mark.usefixtures("data_cache")

ISSUE = [
    {"prompt": "Q", "response_a": "good", "response_b": "bad", "label": 0},
    {"prompt": "Q2", "response_a": "bad", "response_b": "good", "label": 1},
] * 3


def labelled(*labels: Any, names: str = "response_a response_b", key: str = "label") -> list[Any]:
    """Records whose answers name their place."""
    first, second = names.split()
    return [
        {"prompt": f"q{i}", first: "first", second: "second", key: label}
        for i, label in enumerate(labels)
    ]


def write(folder: Path, rows: list[Any], kind: str = "jsonl") -> str:
    file = folder / f"a.{kind}"
    match kind:
        case "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            file.write_text(json.dumps(rows))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        case _:
            with file.open("w", newline="") as stream:
                table = csv.DictWriter(stream, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
    return str(file)


def best(path: str, **options: Any) -> list[str]:
    data, _ = read_source(DataSource.model_validate({"path": path, **options}), "preferences")
    return [row[0] for row in data["answers"][:]]


OPEN = [
    labelled(0, 1),
    labelled(0, 1, 2),
    labelled(0, 1, 2, names="output_1 output_2"),
    labelled(-1, 0, 1),
    labelled(True, False),
    labelled("0", "1"),
    labelled(0.2, 0.9),
    labelled(1, 1),
    labelled(1, 2, 3, key="winner"),
    labelled(0, 1, names="output_1 output_2", key="preference"),
]


@pytest.mark.parametrize("rows", OPEN)
def test_numbers_without_a_meaning_are_refused_with_counts(rows: list[Any], tmp_path: Path) -> None:
    for kind in ("preferences", "sft", "prompts"):
        source = DataSource(path=write(tmp_path, rows))
        with pytest.raises(ValueError, match=r"\(\d+ times\).*`verdicts"):
            read_source(source, kind)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_the_issue_is_refused_and_then_right(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, ISSUE, kind)
    with pytest.raises(ValueError, match=r"label: .* with 0 \(3 times\), 1 \(3 times\)"):
        best(path)
    assert best(path, verdicts={"0": "first", "1": "second"}) == ["good"] * 6
    assert best(path, verdicts={"1": "first", "0": "second"}) == ["bad"] * 6
    mapping = {"prompt": "prompt", "output_1": "response_a", "output_2": "response_b"}
    mapping["preference"] = "label"
    with pytest.raises(ValueError, match=r"preference: .* with 0 \(3 times\), 1 \(3 times\)"):
        best(path, format=mapping)
    told = {"0": "first", "1": "second"}
    assert best(path, format=mapping, verdicts=told) == ["good"] * 6


SETTLED = [
    (labelled(1, 2), ["first", "second"]),
    (labelled(1.0001, 2.0, 1.5), ["first", "second"]),
    (labelled("model_a", "B", "tie"), ["first", "second"]),
    (labelled(0, 1, names="response_0 response_1", key="better_response_id"), ["first", "second"]),
    (labelled(1, 1, names="output_1 output_2"), ["first", "first"]),
]


@pytest.mark.parametrize(("rows", "expected"), SETTLED)
def test_a_column_that_leaves_one_meaning(
    rows: list[Any], expected: list[str], tmp_path: Path
) -> None:
    assert best(write(tmp_path, rows)) == expected


TOLD = [
    (labelled(0, 1, 2), {"0": "first", "1": "tie", "2": "second"}, ["first", "second"]),
    (labelled(-1, 0, 1), {"-1": "second", "0": "tie", "1": "first"}, ["second", "first"]),
    (labelled(True, False), {"true": "first", "false": "second"}, ["first", "second"]),
    (labelled(0.2, 0.9, 0.5), {"0": "second", "1": "first"}, ["second", "first"]),
    (labelled("left", "right"), {"left": "first", "right": "second"}, ["first", "second"]),
    (labelled("A", "B", "tie"), {"a": "second", "b": "first"}, ["second", "first"]),
]


@pytest.mark.parametrize(("rows", "told", "expected"), TOLD)
def test_the_config_gives_the_meaning(
    rows: list[Any], told: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    assert best(write(tmp_path, rows), verdicts=told) == expected


def test_votes_of_annotators_count_and_not_a_label_beside_them(tmp_path: Path) -> None:
    rows = labelled(0, True, "1", names="response1 response2")
    for row, vote in zip(rows, (2, 1, 2), strict=True):
        row |= {"annotator1": vote, "annotator2": vote}
    assert best(write(tmp_path, rows)) == ["second", "first", "second"]


def test_a_value_that_the_config_does_not_name_has_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, labelled(0, 1, 2))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: label: expected one of .*, got 2"):
        best(path, verdicts={"0": "first", "1": "second"})


def test_the_check_and_the_log_count_what_the_verdicts_say(tmp_path: Path) -> None:
    path = write(tmp_path, labelled(0, 0, 0, 1, 2, 2))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {tmp_path}/run\nbackbone: {{path: none}}\nreward:\n  data:\n"
        f"  - path: {path}\n    verdicts: {{0: first, 1: second, 2: tie}}\n"
    )
    cfg = load_config(config)
    said = "verdicts: 3 say first, 1 say second, 2 say tie (label 0 = first; label 1 = second; "
    said += "label 2 = tie)"
    assert examine(cfg, None).report.sources[0].notes[0] == said
    _, report = read_source(cfg.reward.data[0], "preferences")
    assert said in report.summary()
