"""OASST's tables of single messages: trees come back whole, in any order, and nothing vanishes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from malformed_inputs import lines, read_bytes

from chatllama.config.sources import DataSource
from data.reading.grouped import BELOW, JOINED, ORPHAN
from data.reading.marks import DELETED, NOT_REVIEWED
from data.reading.records import Kind
from data.reading.source import GOOD, read_source

pytestmark = pytest.mark.usefixtures("data_cache")


def message(name: str, parent: str | None, text: str, rank: Any = None) -> dict[str, Any]:
    role = "prompter" if text.startswith("q") else "assistant"
    return {"message_id": name, "parent_id": parent, "message_tree_id": name[:1], "role": role,
            "text": text, "rank": rank, "lang": "en"}  # fmt: skip


ROWS = [
    message("a", None, "q1"),
    message("a1", "a", "worse", 1),
    message("a2", "a", "better", 0),
    message("a21", "a2", "q2"),
    message("a211", "a21", "last"),
    message("b", None, "q3"),
    message("b1", "b", "only", 0),
]


def texts(row: Any, key: str = "messages") -> list[str]:
    return [turn["content"] for turn in row[key]]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("format", [None, "oasst"])
def test_rows_of_messages_give_what_their_trees_hold(
    shuffled: bool, format: str | None, tmp_path: Path
) -> None:
    rows = random.Random(3).sample(ROWS, len(ROWS)) if shuffled else ROWS
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*rows))
    source = DataSource.model_validate({"path": str(file), "format": format})
    data, report = read_source(source, "sft")
    assert sorted(map(texts, data)) == [["q1", "better", "q2", "last"], ["q3", "only"]]
    assert report.left_out == {JOINED: 5}
    data, _ = read_source(source, "prompts")
    assert sorted(map(texts, data)) == [["q1"], ["q1", "better", "q2"], ["q3"]]
    data, report = read_source(source, "preferences")
    assert data["answers"][:] == [["better", "worse"]] and texts(data[0], "prompt") == ["q1"]
    assert report.left_out == {JOINED: 5, "no ranked answers in the tree": 1}
    if not shuffled:
        assert data["where"][:] == [f"{file}:1"]


def test_ranks_as_tables_write_them(tmp_path: Path) -> None:
    for zero, one in ((0.0, 1.0), ("0", "1"), ("0.0", "1.0")):
        rows = [ROWS[0], {**ROWS[1], "rank": one}, {**ROWS[2], "rank": zero}]
        found = read_bytes(tmp_path, "a.jsonl", lines(*rows), "preferences")
        assert found[0]["answers"] == ["better", "worse"]
    for strange in (True, "first", 0.5, [0]):
        rows = [ROWS[0], ROWS[1], {**ROWS[2], "rank": strange}]
        found = read_bytes(tmp_path, "a.jsonl", lines(*rows), "preferences")
        assert found[0]["problem"].startswith("a.jsonl:1: rank: expected a whole number or null")


BROKEN: list[tuple[dict[str, Any], str]] = [
    (message("c1", "c", "answer"), ORPHAN),
    (message("c1", "c1", "answer"), ORPHAN),  # its own parent
    ({**message("c1", "c", "answer"), "parent_id": 7}, ORPHAN),
    (message("a1", "b", "answer"), "a.jsonl:8: message_id 'a1' is at a.jsonl:2 too"),
    ({**message("", None, "q")}, "a.jsonl:8: message_id: expected a string, got ''"),
    ({**message("c", None, "q"), "message_id": 3}, "a.jsonl:8: message_id: expected a string"),
    ({**message("c", None, "q"), "text": 3}, "a.jsonl:8: messages[0].content: expected a string"),
    ({**message("c", None, "q"), "role": None}, "a.jsonl:8: messages[0]: 'role' must name"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_broken_messages_have_their_place(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    kinds: list[Kind] = ["prompts", "sft"]
    for kind in kinds:
        found = read_bytes(tmp_path, "a.jsonl", lines(*ROWS, row), kind)
        (last,) = [each for each in found if each["number"] == 7]
        assert last["severity"] != GOOD
        if kind == "prompts":
            assert last["problem"].startswith(reason) and last["where"] == "a.jsonl:8"
        assert sum(each["severity"] == GOOD for each in found) == (3 if kind == "prompts" else 2)


def test_real_trees_as_rows_give_the_same(testdata: Path, tmp_path: Path) -> None:
    """Ranked lists written as messages, read back."""
    ranked = json.loads((testdata / "oasst/oaast_rm_zh.json").read_text("utf-8"))[:200]
    rows = []
    for number, each in enumerate(ranked):
        rows.append(message(f"{number}", None, "q"))
        rows[-1]["text"] = "\n\n".join(filter(None, [each["instruction"], each["input"]]))
        for rank, answer in enumerate(each["output"]):
            rows.append(message(f"{number}.{rank}", f"{number}", answer, rank))
            rows[-1]["role"] = "assistant"
    random.Random(0).shuffle(rows)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*rows))
    ours, _ = read_source(DataSource(path=str(file)), "preferences")
    source = DataSource(path=str(testdata / "oasst/oaast_rm_zh.json"))
    theirs, _ = read_source(source, "preferences")
    found = {(texts(row, "prompt")[0], *row["answers"]) for row in ours.to_list()}
    expected = {(texts(row, "prompt")[-1], *row["answers"]) for row in theirs.to_list()}
    assert len(found) > 190 and found < expected


REMOVED: list[tuple[dict[str, Any], str]] = [
    ({"deleted": True}, DELETED),
    ({"review_result": False}, NOT_REVIEWED),
    ({"deleted": "True"}, DELETED),
]


def nested(rows: list[dict[str, Any]], parent: str | None = None) -> list[dict[str, Any]]:
    """The messages as OASST's whole trees have them."""
    below = [row for row in rows if row["parent_id"] == parent]
    return [{**row, "replies": nested(rows, row["message_id"])} for row in below]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("mark", "reason"), REMOVED)
def test_removed_messages_are_left_out_and_counted(
    mark: dict[str, Any], reason: str, whole: bool, tmp_path: Path
) -> None:
    """The best answer is removed, and with it what is below it: the worse one is followed."""
    rows: list[Any] = [ROWS[0], ROWS[1], {**ROWS[2], **mark}, *ROWS[3:]]
    rows.append(message("b2", "b", "other", 1))
    if whole:
        rows = [{"message_tree_id": "t", "prompt": tree} for tree in nested(rows)]
    found = read_bytes(tmp_path, "a.jsonl", lines(*rows), "sft")
    assert [texts(row) for row in found if row["severity"] == GOOD] == [
        ["q1", "worse"], ["q3", "only"],
    ]  # fmt: skip
    problems = [row["problem"] for row in found if row["problem"] not in ("", JOINED)]
    assert problems == ([reason] if whole else [reason, BELOW, BELOW])
    found = read_bytes(tmp_path, "a.jsonl", lines(*rows), "preferences")
    assert [row["answers"] for row in found if row["severity"] == GOOD] == [["only", "other"]]
    kept = read_bytes(tmp_path, "a.jsonl", lines(*rows), "sft", keep_deleted=True)
    best = [texts(row) for row in kept if row["severity"] == GOOD]
    assert best == [["q1", "better", "q2", "last"], ["q3", "only"]]


@pytest.mark.parametrize("mark", [mark for mark, _ in REMOVED])
def test_a_removed_first_message_takes_its_tree_along(mark: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**ROWS[0], **mark}, *ROWS[1:]]
    found = read_bytes(tmp_path, "a.jsonl", lines(*rows), "prompts")
    assert [texts(row) for row in found if row["severity"] == GOOD] == [["q3"]]
    assert [row["problem"] for row in found].count(BELOW) == 4


def test_many_removed_messages_are_no_wrong_format(tmp_path: Path) -> None:
    removed = [{**message(f"a{i}x", "a", "bad", i + 2), "deleted": True} for i in range(20)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*ROWS, *removed))
    _, report = read_source(DataSource(path=str(file)), "sft")
    assert report.left_out[DELETED] == 20 and report.num_kept == 2
