"""OASST's tables of single messages: trees come back whole, in any order, and nothing vanishes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from malformed_inputs import lines, read_bytes

from chatllama.config.sources import DataSource
from data.reading.grouped import JOINED, ORPHAN
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
