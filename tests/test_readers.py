"""Files, places of errors, and what real public data gives."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from chatllama.config import DataSource
from data.files import PROJECT_ROOT, find_file
from data.readers import read_source
from data.records import Kind


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(path: Path | str, kind: Kind, format: Any = None) -> Any:
    return read_source(DataSource(path=str(path), format=format), kind)


ROWS: list[dict[str, Any]] = [
    {"prompt": "q", "completion": "NA"},
    {"prompt": "r,\n\ns", "completion": "  None"},
]
EXPECTED = [("q", "NA"), ("r,\n\ns", "  None")]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    lines = "\n".join(json.dumps(row) for row in rows)
    match file.name.split(".", 1)[1]:
        case "json":
            file.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
        case "jsonl":
            file.write_text(lines.replace("\n", "\r\n\r\n"), newline="")
        case "jsonl.gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case "csv":
            with file.open("w", newline="", encoding="utf-8-sig") as stream:
                table = csv.DictWriter(stream, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        case "parquet":
            datasets.Dataset.from_list(rows).to_parquet(file)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.json", ["record 1", "record 2"]),
        ("a.jsonl", ["1", "3"]),
        ("a.jsonl.gz", ["1", "2"]),
        ("a.csv", ["2", "3"]),
        ("a.parquet", ["record 1", "record 2"]),
    ],
)
def test_every_file_type_gives_the_same_records(
    tmp_path: Path, name: str, places: list[str]
) -> None:
    write(tmp_path / name, ROWS)
    data, report = read(tmp_path / name, "sft")
    assert [tuple(turn["content"] for turn in row["messages"]) for row in data] == EXPECTED
    assert [row["where"].split(":", 1)[1].strip() for row in data] == places
    assert (report.num_read, report.num_kept, report.format) == (2, 2, "prompt_completion")


def test_line_numbers_of_csv_after_long_and_blank_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion\r\n"a\r\nb",c\r\n\r\nd,e\r\n', newline="")
    data, _ = read(file, "sft")
    assert [row["where"] for row in data] == [f"{file}:2", f"{file}:5"]
    file.write_text("prompt,completion\na,b\nc\n")
    with pytest.raises(ValueError, match=r"a\.csv:3: 1 cells under a header of 2"):
        read(file, "sft")


def test_folder_is_read_as_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "some_set"
    folder.mkdir()
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    write(folder / "train.jsonl", [pair, {**pair, "margin": 2.0}, {**pair, "chosen": "b"}])
    data, report = read(folder, "preferences")
    assert data["ratings"][:] == [
        [0.0, 0.0],
        [2.0, 0.0],
    ]  # the null that `datasets` filled in is no margin
    assert report.left_out == {"chosen equals rejected": 1}
    assert report.examples == [f"{folder}: record 3: chosen equals rejected"]
    write(folder / "train.jsonl", [{"prompt": "q"}, {"prompt": "r", "completion": "s"}])
    data, report = read(folder, "prompts")  # the first record has no completion, not an empty one
    assert (len(data), report.format) == (2, "prompts")


def test_txt_is_text_between_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\r\n\r\none\r\nstill one\r\n \r\n\r\ntwo")
    data, _ = read(file, "text")
    assert data["text"][:] == ["one\nstill one", "two"]
    assert data["where"][:] == [f"{file}:3", f"{file}:7"]
    with pytest.raises(ValueError, match="no format for sft fits"):
        read(file, "sft")


BROKEN: list[tuple[str, bytes, str]] = [
    (
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": "b"\n',
        r"a\.jsonl:3: broken JSON .*'{\"text\": \"b\"'",
    ),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2: key 'text' is missing"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
    ("a.json", b'[{"text": "a"},\n{"text": "b"]', r"a\.json:2: broken JSON"),
    ("a.json", b'[{"text": "a"}, 3]', r"a\.json: record 2: the record: expected an object"),
    ("a.jsonl", b"", r"a\.jsonl: no records"),
    ("a.xml", b"<a/>", r"a\.xml: unknown file type '\.xml'; known: \.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_malformed_files_stop_with_their_place(
    tmp_path: Path, name: str, content: bytes, message: str, packed: bool
) -> None:
    file = tmp_path / (name + ".gz" if packed else name)
    file.write_bytes(gzip.compress(content) if packed else content)
    message = message.replace(name.replace(".", r"\."), file.name.replace(".", r"\."))
    with pytest.raises(ValueError, match=message):
        read(file, "text")


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match=r"no data file .*trian\.jsonl.*did you mean train\.jsonl"):
        find_file(str(tmp_path / "trian.jsonl"))
    assert find_file("somebody/some_set") is None


def test_relative_paths_also_start_at_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = "data/samples/alpaca.jsonl"
    assert find_file(inside) == PROJECT_ROOT / inside
    (tmp_path / "data/samples").mkdir(parents=True)
    (tmp_path / inside).touch()
    assert find_file(inside) == tmp_path / inside


def test_unusable_records_are_counted_and_most_of_them_stop(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good, empty = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": " "}
    write(file, [good, empty, good, empty])
    data, report = read(file, "sft")
    assert len(data) == 2 and report.left_out == {"empty assistant turn": 2}
    assert report.examples == [f"{file}:3: empty assistant turn", f"{file}:7: empty assistant turn"]
    assert (
        report.summary()
        .splitlines()[0]
        .endswith("2 of 4 records; left out: 2 empty assistant turn")
    )
    write(file, [good, empty, empty])
    with pytest.raises(ValueError, match="more than 50% of the records cannot serve as sft"):
        read(file, "sft")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write(file, [{"text": "a"}])
    assert read(file, "text")[0]["text"][:] == ["a"]
    write(file, [{"text": "b"}])
    assert read(file, "text")[0]["text"][:] == ["b"]


@pytest.mark.parametrize(
    ("name", "kind", "format", "size"),
    [
        ("alpaca", "sft", "alpaca", 12),
        ("messages", "sft", "messages", 6),
        ("preferences", "preferences", "preference", 8),
        ("prompts", "prompts", "prompts", 8),
    ],
)
def test_own_samples(name: str, kind: Kind, format: str, size: int) -> None:
    data, report = read(f"data/samples/{name}.jsonl", kind)
    assert (len(data), report.format, report.left_out) == (size, format, {})


ALTERNATE, EMPTY = "roles do not alternate between user and assistant", "empty assistant turn"
REAL: list[tuple[str, Kind, str, int, dict[str, int]]] = [
    ("llama_factory/alpaca_en_demo.json", "sft", "alpaca", 999, {}),
    ("llama_factory/alpaca_en_demo.json", "prompts", "alpaca", 999, {}),
    ("llama_factory/v1_sft_demo.jsonl", "sft", "messages", 500, {}),
    ("llama_factory/dpo_en_demo.json", "preferences", "preference", 300, {}),
    ("oasst/oaast_rm_zh.json", "preferences", "ranked", 772, {"all answers are equal": 3}),
    ("llama_factory/c4_demo.jsonl", "text", "text", 300, {}),
    ("sharegpt/dpo_zh_500.jsonl", "preferences", "preference", 500, {}),
    (
        "sharegpt/sharegpt_zh_1K_format.jsonl",
        "sft",
        "sharegpt",
        992,
        {"the last turn is the user's": 7, "empty user turn": 1},
    ),
    # Lines 87, 517, 926, 1104 answer nothing; 668, 764, 1255, 1320, 1689 have two turns in a row.
    (
        "hh_rlhf/harmless-base-first1800.jsonl.gz",
        "preferences",
        "hh",
        1791,
        {ALTERNATE: 5, EMPTY: 4},
    ),
    (
        "hh_rlhf/harmless-base-first1800.jsonl.gz",
        "prompts",
        "hh",
        1795,
        {ALTERNATE: 3, "the last turn is the assistant's": 2},
    ),
]


@pytest.mark.parametrize(("path", "kind", "format", "kept", "left_out"), REAL)
def test_real_data(
    testdata: Path, path: str, kind: Kind, format: str, kept: int, left_out: dict[str, int]
) -> None:
    data, report = read(testdata / path, kind)
    assert report.format == format
    assert (len(data), report.num_kept) == (kept, kept)
    assert report.left_out == left_out
    assert report.num_read == kept + sum(left_out.values())


def test_lines_of_real_hh_pairs(testdata: Path) -> None:
    _, report = read(testdata / "hh_rlhf/harmless-base-first1800.jsonl.gz", "preferences")
    lines = [example.split(".gz:")[1].split(":")[0] for example in report.examples]
    assert lines == ["87", "517", "668", "764", "926"]


def test_real_labels_are_not_ignored(testdata: Path) -> None:
    with pytest.raises(ValueError, match="record 1: the boolean `label`"):
        read(testdata / "llama_factory/kto_en_demo.json", "sft")
