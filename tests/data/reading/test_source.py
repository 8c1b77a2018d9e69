"""Files, places of errors, and what real public data gives."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from chatllama.config.sources import DataSource, Format
from data.reading.files import PROJECT_ROOT, find_files
from data.reading.records import Kind
from data.reading.source import _decode, _load_hub, read_source

pytestmark = pytest.mark.usefixtures("data_cache")


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


def test_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    folder = tmp_path / "some_set"
    (folder / "harmless").mkdir(parents=True)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    write(folder / "train.jsonl", [pair, {**pair, "margin": 2.0}, {**pair, "chosen": "b"}])
    write(folder / "harmless" / "train-00000-of-00001.jsonl.gz", [{**pair, "prompt": "r"}])
    write(folder / "harmless" / "test.jsonl", [pair])
    (folder / ".train.jsonl").write_text("{")
    (folder / "README.md").touch()
    data, report = read(folder, "preferences")
    assert data["ratings"][:] == [[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    assert data["where"][0] == f"{folder}/harmless/train-00000-of-00001.jsonl.gz:1"
    assert report.left_out == {"chosen equals rejected": 1}
    assert report.examples == [f"{folder}/train.jsonl:5: chosen equals rejected"]
    held = read_source(DataSource(path=str(folder), split="eval"), "preferences")[0]
    assert held["where"][:] == [f"{folder}/harmless/test.jsonl:1"]
    with pytest.raises(ValueError, match=r"no files of the split 'dev'; there are \['test', 'tra"):
        find_files(str(folder), "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data files in this folder"):
        find_files(str(tmp_path / "empty"))


def test_folder_without_splits_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path, "text")[0]["text"][:] == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match="no file name there has a split in it"):
        find_files(str(tmp_path), "test")
    assert read(tmp_path / "[ab]*.txt", "text")[0]["text"][:] == ["a.txt", "b.txt"]
    monkeypatch.chdir(tmp_path)
    assert read("?.txt", "text")[0]["where"][:] == ["a.txt:1", "b.txt:1"]
    with pytest.raises(ValueError, match=r"no file matches '\*\.json'"):
        find_files("*.json")


def test_hub_data_set_is_read_through_its_local_copy(tmp_path: Path) -> None:
    """`datasets` loads a folder as it loads a data set of the hub."""
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    write(tmp_path / "train.jsonl", [pair, {**pair, "margin": 2.0}, {**pair, "chosen": "b"}])
    source = DataSource(path=str(tmp_path))
    rows = list(_decode(DataSource(path="some/set"), _load_hub(source)))
    # The null that `datasets` filled in is no margin.
    assert rows[0] == ("some/set: record 1", pair) and rows[1][1] == {**pair, "margin": 2.0}
    assert len(rows) == 3
    with pytest.raises(ValueError, match="no data set of that name with a split 'none'"):
        _load_hub(DataSource(path=str(tmp_path), split="none"))


def copy_of_hub(cache: Path, name: str, file: Path) -> None:
    """The data set `name` of the hub, as `datasets` keeps it once it was downloaded."""
    files = {"train": str(file)}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(cache / "new"))
    builder.download_and_prepare()
    owner, short = name.split("/")
    folder = cache / f"{owner}___{short}" / "default" / "0.0.0" / "0123456789abcdef"
    shutil.copytree(builder.cache_dir, folder)
    (folder / "json-train.arrow").rename(folder / f"{short}-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))


@pytest.mark.parametrize(
    ("name", "path", "kind", "format", "size"),
    [
        ("tatsu-lab/alpaca", "llama_factory/alpaca_en_demo.json", "sft", "alpaca", 999),
        ("Anthropic/hh-rlhf", "hh_rlhf/harmless-base-first1800.jsonl.gz", "preferences", "hh",
         1791),
    ],
)  # fmt: skip
def test_ids_of_the_hub(
    testdata: Path, tmp_path: Path, name: str, path: str, kind: Kind, format: Format, size: int
) -> None:
    copy_of_hub(tmp_path / "cache", name, testdata / path)
    data, report = read(name, kind)
    assert (len(data), report.format) == (size, format)
    assert data["where"][0] == f"{name}: record 1"
    with pytest.raises(ValueError, match=f"no file '{name}', and no data set .* split 'test'"):
        read_source(DataSource(path=name, split="test"), kind)


def test_ids_that_the_hub_does_not_have() -> None:
    with pytest.raises(ValueError, match="no file 'some/set', and no data set of that name"):
        read("some/set", "sft")


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
        find_files(str(tmp_path / "trian.jsonl"))
    assert find_files("somebody/some_set") is None


def test_relative_paths_also_start_at_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = "data/samples/alpaca.jsonl"
    assert [file.path for file in find_files(inside) or []] == [PROJECT_ROOT / inside]
    (tmp_path / "data/samples").mkdir(parents=True)
    (tmp_path / inside).touch()
    assert [file.path for file in find_files(inside) or []] == [tmp_path / inside]


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
    with pytest.raises(ValueError, match="more than 50% of the records cannot be used for sft"):
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


ALONE = "no answer with the other label to the same prompt"
JOINED = "joined with the other answers to its prompt"
ALTERNATE, EMPTY = "roles do not alternate between user and assistant", "empty assistant turn"
REAL: list[tuple[str, Kind, str, int, dict[str, int]]] = [
    ("llama_factory/alpaca_en_demo.json", "sft", "alpaca", 999, {}),
    ("llama_factory/alpaca_en_demo.json", "prompts", "alpaca", 999, {}),
    ("llama_factory/v1_sft_demo.jsonl", "sft", "messages", 500, {}),
    ("llama_factory/dpo_en_demo.json", "preferences", "preference", 300, {}),
    ("oasst/oaast_rm_zh.json", "preferences", "ranked", 772, {"all answers are equal": 3}),
    ("llama_factory/alpaca_zh_demo.json", "sft", "alpaca", 1000, {}),
    ("llama_factory/dpo_zh_demo.json", "preferences", "preference", 300, {}),
    ("llama_factory/kto_en_demo.json", "sft", "kto", 150, {"labelled as a bad answer": 150}),
    ("llama_factory/kto_en_demo.json", "preferences", "kto", 1, {ALONE: 298, JOINED: 1}),
    ("llama_factory/kto_en_demo.json", "prompts", "kto", 300, {}),
    ("fastchat/dummy_conversation.json", "sft", "sharegpt", 500, {}),
    ("fastchat/mt_bench_question.jsonl", "prompts", "turns", 80, {}),
    ("fastchat/vicuna_question.jsonl", "prompts", "turns", 80, {}),
    ("self_instruct/seed_tasks.jsonl", "sft", "self_instruct", 175, {}),
    ("self_instruct/user_oriented_instructions.jsonl", "sft", "self_instruct", 252, {}),
    ("ko_chatbot/ChatbotData.csv", "sft", "question_answer", 11823, {}),
    ("ja_instruction/data.jsonl", "sft", "utterances", 669, {}),
    ("oasst/oaast_rm_zh.json", "sft", "ranked", 775, {}),
    ("text/tinyshakespeare.txt", "text", "text", 7222, {}),
    ("text/ahmedessaa_tinystories_30k.txt", "text", "text", 1, {}),
    ("text/cs336_tinystories_sample.txt", "text", "text", 2, {}),
    ("text/niklas6_tinystories.txt", "text", "text", 1230, {}),
    ("llama_factory/c4_demo.jsonl", "text", "text", 300, {}),
    ("sharegpt/dpo_zh_500.jsonl", "preferences", "preference", 500, {}),
    (
        "sharegpt/sharegpt_zh_1K_format.jsonl",
        "sft",
        "sharegpt",
        988,  # lines 758, 859, 893, 990 have an answer of U+200B alone
        {"the last turn is the user's": 7, "empty assistant turn": 4, "empty user turn": 1},
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


MMLU = ["question", "A", "B", "C", "D", "answer"]
NAMED: list[tuple[str, Kind, dict[str, Any], int]] = [
    ("reviews/rt-polarity.neg", "text", {"format": "lines"}, 5331),
    ("reviews/rt-polarity.pos", "text", {"format": "lines"}, 5331),
    ("reviews/rt-polarity.*", "prompts", {"format": "lines"}, 10662),
    ("reviews/nsmc_first20000.jsonl", "text", {"format": {"text": "review"}}, 20000),
    ("hellaswag/hellaswag_val_first1000.jsonl", "prompts", {"format": {"prompt": "ctx"}}, 1000),
    ("mmlu/test/*.csv", "prompts", {"format": {"prompt": "question"}, "columns": MMLU}, 1842),
    ("mmlu", "prompts", {"format": {"prompt": "question"}, "columns": MMLU, "split": "dev"}, 285),
    ("llama_factory/wiki_demo.txt", "text", {"format": "lines"}, 30),
]  # fmt: skip


@pytest.mark.parametrize(("path", "kind", "options", "size"), NAMED)
def test_real_data_that_must_be_told(
    testdata: Path, path: str, kind: Kind, options: dict[str, Any], size: int
) -> None:
    source = DataSource.model_validate({"path": str(testdata / path), **options})
    data, report = read_source(source, kind)
    assert (len(data), report.left_out) == (size, {})


def test_no_real_file_is_forgotten(testdata: Path) -> None:
    """Every data file of the folder has a row above."""
    patterns = [path for path, *_ in (*REAL, *NAMED)] + ["mmlu/dev/*"]
    weights = ("stories260k", "llama_tokenizer")
    files = [file for file in testdata.rglob("*") if file.is_file() and file.name != "LICENSE"]
    data = [file for file in files if file.relative_to(testdata).parts[0] not in weights]
    unread = [file for file in data if not any(file.match(pattern) for pattern in patterns)]
    assert [file.name for file in unread] == ["README.md"]


def test_real_labels_that_pair_up(testdata: Path) -> None:
    data, _ = read(testdata / "llama_factory/kto_en_demo.json", "preferences")
    assert data["ranks"][:] == [[0, 1]] and len(set(data["answers"][0])) == 2
