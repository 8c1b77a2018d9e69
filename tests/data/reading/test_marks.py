"""Keys beside the text that change its meaning: honoured, or counted by name, never dropped."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from malformed_inputs import GOOD_PAIR, GOOD_SFT, lines, message, read_bytes
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource
from chatllama.text.encoding import decode
from data.checking.records import check_records
from data.checking.report import Findings, StageSource
from data.reading.marks import WEIGHED
from data.reading.records import Kind
from data.reading.source import read_rows, read_source
from data.tokenize import tokenize

pytestmark = pytest.mark.usefixtures("data_cache")

MARKS: list[tuple[str, Any, Any]] = [
    ("weight", 0, 1),
    ("weight", 0.0, None),
    ("loss_weight", 0, 1.0),
    ("train", False, True),
    ("training", "false", "true"),
]


def marked(key: str, no: Any, yes: Any, roles: str = "role content") -> list[dict[str, Any]]:
    role, content = roles.split()
    names = ("human", "gpt") if role == "from" else ("user", "assistant")
    said = [(names[0], "q"), (names[1], "BAD"), (names[0], "r"), (names[1], "fine")]
    turns: list[dict[str, Any]] = [{role: who, content: text} for who, text in said]
    turns[1][key] = no
    turns[3][key] = yes
    return turns


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("key", "no", "yes"), MARKS)
@pytest.mark.parametrize("template", ["llama2", "vicuna", "alpaca"])
def test_turns_that_are_not_to_be_trained(
    key: str, no: Any, yes: Any, kind: str, template: Any, tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    file = tmp_path / f"a.{kind}"
    rows = [
        {"messages": marked(key, no, yes)},
        {"messages": [{k: v for k, v in t.items() if k != key} for t in marked(key, no, yes)]},
    ]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(lines(*rows))
    data, _ = read_source(DataSource(path=str(file)), "sft")
    assert data["untrained"][:] == [[1], []]
    assert data[0]["messages"] == data[1]["messages"]
    examples, _ = tokenize(data, "sft", tokenizer, ChatSection(template=template), 200)
    trained = []
    for example in list[Any](examples):
        pairs = zip(example["input_ids"], example["mask"], strict=True)
        trained.append(decode(tokenizer, [token for token, mask in pairs if mask]))
    assert trained[0].split() == ["fine"]
    assert trained[1].replace(" ", "") == "BADfine"
    assert examples[0]["input_ids"] == examples[1]["input_ids"]


def test_turns_of_sharegpt_and_mapped_columns(tmp_path: Path) -> None:
    row = {"conversations": marked("weight", 0, 1, "from value")}
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "sft")
    assert found["untrained"] == [1]
    mapped = {"messages": "talk"}
    row = {"talk": marked("train", False, True)}
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "sft", format=mapped)
    assert found["untrained"] == [1]


def sft(**keys: Any) -> dict[str, Any]:
    return {**GOOD_SFT, **keys}


def answer(**keys: Any) -> dict[str, Any]:
    return {"messages": [message("user", "q"), {**message("assistant", "a"), **keys}]}


LEFT_OUT: list[tuple[dict[str, Any], str]] = [
    (answer(weight=0), "every turn of the assistant is marked as not to be trained on"),
    (answer(weight=0.5), "weight: 0.5 on a turn of the assistant"),
    (answer(mask=True), "mask: True on a turn of the assistant"),
    (answer(tool_calls=[{"id": 1}]), "tool calls"),
    (answer(function_call={"name": "f"}), "tool calls"),
    ({"messages": [{**message("user", "q"), "train": True}, message("assistant", "a")]},
     "train: True on a turn of the user"),
    (sft(weight=0), "weight: 0"),
    (sft(training=False), "training: False"),
    (sft(weight=0.5), WEIGHED),
    (sft(loss_weight=2), WEIGHED),
    (sft(weight="0.25"), WEIGHED),
    (sft(train=-1), WEIGHED),
    (sft(mask=[0, 1]), "the key 'mask', which may mean either of two things"),
    *((sft(**{key: ["a.png"]}), f"{key} beside the text")
      for key in ("images", "image", "videos", "audios")),
    (sft(tools='[{"name": "f"}]'), "tools beside the text"),
    (sft(deleted=True), "deleted: true"),
    (sft(review_result=False), "review_result: false"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), LEFT_OUT)
def test_records_whose_text_is_not_all(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good, bad = read_bytes(tmp_path, "a.jsonl", lines(GOOD_SFT, row), "sft")
    assert (good["problem"], bad["problem"]) == ("", reason)


@pytest.mark.parametrize(
    "keys",
    [{"weight": 1}, {"tools": []}, {"tools": "[]"}, {"images": None}, {"deleted": False},
     {"review_result": True}, {"review_result": None}, {"train": True}, {"mask": None},
     {"train": "Berlin to Hamburg"}, {"weight": "heavy"}, {"weight": 1.0}, {"weight": ""}],
)  # fmt: skip
def test_marks_that_change_nothing(keys: dict[str, Any], tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, "a.jsonl", lines(sft(**keys)), "sft")
    assert row["problem"] == ""


@pytest.mark.parametrize("kind", ["sft", "preferences", "prompts"])
def test_weights_of_records_are_counted_in_every_stage_and_refused_where_most_have_one(
    kind: Kind, tmp_path: Path
) -> None:
    rows = [{**GOOD_PAIR, "weight": weight} for weight in (1, 1.0, 0.5, 3)]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    _, report = read_source(DataSource(path=str(tmp_path / "a.jsonl")), kind)
    assert report.num_kept == 2 and report.left_out == {WEIGHED: 2}
    (tmp_path / "b.jsonl").write_bytes(lines(*rows[1:]))
    with pytest.raises(ValueError, match=r"cannot be used for.*\n.*2 a weight of the record"):
        read_source(DataSource(path=str(tmp_path / "b.jsonl")), kind)


def test_deleted_records_may_be_kept(tmp_path: Path) -> None:
    row = sft(deleted=True, review_result=False)
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "sft", keep_deleted=True)
    assert found["problem"] == ""


SCORES: list[tuple[float, float, str | float]] = [
    (8.5, 6.0, 2.5),
    (3.0, 3.0, "a tie"),
    (2.0, 9.0, "score_chosen is below score_rejected"),
]


@pytest.mark.parametrize(("chosen", "rejected", "expected"), SCORES)
def test_scores_of_a_pair(
    chosen: float, rejected: float, expected: str | float, tmp_path: Path
) -> None:
    row = {**GOOD_PAIR, "score_chosen": chosen, "score_rejected": rejected}
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "preferences")
    if isinstance(expected, str):
        assert found["problem"] == expected
    else:
        assert found["ratings"] == [expected, 0.0]


def test_the_check_lists_keys_that_are_not_used(tmp_path: Path) -> None:
    turn = {**message("user", "q"), "colour": "red"}
    file = tmp_path / "a.jsonl"
    rows = [
        sft(id=1, synthetic=True, weight=1),
        sft(id=2, training="tomorrow"),
        {"messages": [turn, message("assistant", "b")]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(file))
    part = StageSource("sft", "data", source, "sft", None)
    check_records(read_rows(source, "sft"), part, Findings())
    assert part.notes == [
        "keys not used: id (2), synthetic (1), training (1), messages[].colour (1)"
    ]


DOLLY = {"instruction": "q", "context": "c", "response": "a"}
ORCA = {"system_prompt": "s", "question": "q", "response": "a"}


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (DOLLY, []),
        (ORCA, []),
        ({**DOLLY, "category": "qa"}, ["key not used: category"]),
        ({"instruction": "q", "output": "a", "response": "b"}, ["key not used: response"]),
    ],
)
def test_keys_of_known_data_sets_are_used(
    row: dict[str, Any], unused: list[str], tmp_path: Path
) -> None:
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "sft")
    assert found["notes"] == unused
