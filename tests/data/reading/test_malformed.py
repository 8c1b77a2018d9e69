"""Bad inputs: every defect has its place, no record vanishes, nothing crashes, however random."""

import bz2
import gzip
import io
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from malformed_inputs import BASE, GOOD_ALPACA, GOOD_PAIR, GOOD_SFT, Bad, lines, message, read_bytes

from data.reading.records import KIND_FORMATS, Kind
from data.reading.source import GOOD


def test_the_corpus_is_large_enough() -> None:
    assert len(BASE) >= 60


@pytest.mark.parametrize("bad", BASE, ids=lambda bad: f"{bad.name}-{bad.words[:30]}")
def test_defects_have_their_place(bad: Bad, tmp_path: Path) -> None:
    try:
        rows = read_bytes(tmp_path, bad.name, bad.content, bad.kind, **bad.options)
    except ValueError as error:
        assert str(error).startswith(bad.where) and bad.words in str(error)
        return
    wrong = [row for row in rows if row["severity"] != GOOD]
    assert len(wrong) == 1 and wrong[0]["where"].startswith(bad.where)
    assert bad.words in wrong[0]["problem"]
    if bad.where == "a.jsonl:2":  # the records around it are there
        assert [row["where"] for row in rows if row["severity"] == GOOD] == [
            "a.jsonl:1", "a.jsonl:3",
        ]  # fmt: skip


HH = "\n\nHuman: q\n\nAssistant: a"
TREE = {
    "message_tree_id": "t",
    "prompt": {"role": "prompter", "text": "q", "replies": [
        {"role": "assistant", "text": "a", "rank": 0, "replies": []},
        {"role": "assistant", "text": "b", "rank": 1, "replies": []},
    ]},
}  # fmt: skip
SAMPLES: dict[str, dict[str, Any]] = {
    "alpaca": {**GOOD_ALPACA, "history": [["x", "y"]], "system": "s"},
    "messages": GOOD_SFT,
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "question_answer": {"Q": "q", "A": "a", "label": "0"},
    "self_instruct": {"instruction": "q", "instances": [{"input": "", "output": "a"}] * 2},
    "utterances": {"utterances": [{"name": "user", "text": "q"}, {"name": "agent", "text": "a"}]},
    "text": {"text": "t"},
    "lines": {"text": "t"},
    "preference": {**GOOD_PAIR, "margin": 1.5},
    "hh": {"chosen": HH, "rejected": HH + "b"},
    "ranked": {"prompt": [message("user", "q")], "answers": ["a", "b"], "scores": [2, 1.0]},
    "comparison": {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.2},
    "kto": {**GOOD_SFT, "label": True},
    "oasst": TREE,
    "prompts": {"prompt": "q"},
    "turns": {"turns": ["q", "r"]},
}
STRANGE: list[Any] = [
    None, True, False, 0, -1, 2.5, float("nan"), float("inf"), 10**30, "", " ", "\n\nHuman:", "q",
    "\ud800", "\x00", "</s>", "1", [], {}, [[]], [{}], [None], {"role": "user"}, ["a", "b"],
    {"from": "gpt", "value": 3}, [{"role": "user", "content": "q"}], "x" * 5000,
    "assistant", "\u2028",
]  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one random place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        match rng.randrange(6):
            case 0:
                return rest
            case 1:
                return {**rest, key.upper(): value[key]}
            case 2:
                return {**value, rng.choice(list(EVERY_KEY)): rng.choice(STRANGE)}
            case _:
                return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, value[place]]
            case _:
                return [*value[:place], mutate(value[place], rng), *value[place + 1 :]]
    return rng.choice(STRANGE)


EVERY_KEY = dict.fromkeys(key for sample in SAMPLES.values() for key in sample)


@pytest.mark.parametrize("format", SAMPLES)
def test_any_record_is_good_or_has_a_reason(format: str, tmp_path: Path) -> None:
    rng = random.Random(format)
    kinds: list[Kind] = [kind for kind, formats in KIND_FORMATS.items() if format in formats]
    for round_ in range(12):
        rows = []
        for _ in range(25):
            row = SAMPLES[format]
            for _ in range(rng.choice((1, 1, 2, 4))):
                row = mutate(row, rng)
            rows.append(row)
        kind = kinds[round_ % len(kinds)]
        named: dict[str, Any] = {"format": format} if round_ % 3 else {}
        if format == "comparison":
            named["verdicts"] = {"1": "first", "2": "second"}
        found = read_bytes(tmp_path, "a.jsonl", lines(*rows), kind, **named)
        assert len({row["number"] for row in found}) == 25


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("sft", {"prompt": "messages.0.content", "completion": "messages.1.content"}),
        ("sft", {"prompt": "q", "completion": "messages", "label": "role"}),
        ("preferences", {"messages": "messages", "answers": "messages.0"}),
        ("prompts", {"prompt": "messages.0", "system": "messages.1.role"}),
        ("text", {"text": "messages.1.content"}),
    ],
)
def test_any_column_is_good_or_has_a_reason(
    kind: Kind, columns: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(kind)
    rows = [mutate(mutate(SAMPLES["messages"], rng), rng) for _ in range(200)]
    found = read_bytes(tmp_path, "a.jsonl", lines(*rows), kind, format=columns)
    assert len({row["number"] for row in found}) == 200


def test_fuzzing_reaches_good_and_bad_records(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [mutate(SAMPLES["messages"], rng) for _ in range(300)]
    found = read_bytes(tmp_path, "a.jsonl", lines(*rows), "sft", format="messages")
    counts = {severity: sum(row["severity"] == severity for row in found) for severity in (0, 1, 2)}
    assert min(counts.values()) >= 15, counts


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


TABLE = b'Q,A,label\r\nq1,a1,0\r\n"q,\r\n2","a ""2""",1\r\nq3,a3,2\r\n'
ROWS = [{"prompt": f"q{i}", "completion": f"a{i} \u00e9\uc548"} for i in range(20)]
FILES: dict[str, bytes] = {
    "a.jsonl": lines(*ROWS),
    "a.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "a.csv": TABLE,
    "a.tsv": TABLE.replace(b",", b"\t"),
    "a.parquet": parquet(ROWS),
    "a.jsonl.gz": gzip.compress(lines(*ROWS)),
    "a.jsonl.bz2": bz2.compress(lines(*ROWS)),
    "a.jsonl.xz": lzma.compress(lines(*ROWS)),
    "a.jsonl.zst": zstd(lines(*ROWS)),
    "a.txt": "one\n\ntwo \u00e9\nthree\r\n\r\nfour".encode(),
}


def damage(content: bytes, rng: random.Random) -> bytes:
    """The bytes with something flipped, cut, doubled, put in or taken out."""
    begin, end = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    end = min(end, begin + rng.choice((1, 2, 8, 200)))
    piece = content[begin:end]
    match rng.randrange(6):
        case 0:
            return content[:begin]
        case 1:
            return content[:begin] + piece + content[begin:]
        case 2:
            return content[:begin] + content[end:]
        case 3:
            return content[:begin] + rng.randbytes(rng.choice((1, 3))) + content[begin:]
        case 4:
            tokens = [b'"', b"\n", b"\r", b"{", b"]", b",", b"\x00", b"\\", b"\xef\xbb\xbf", b"\t"]
            return content[:begin] + rng.choice(tokens) + content[begin:]
        case _:
            flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in piece)
            return content[:begin] + flipped + content[end:]


@pytest.mark.parametrize("name", FILES)
def test_any_file_is_read_or_has_a_place(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    kind: Kind = "text" if name == "a.txt" else "sft"
    for _ in range(150):
        content = FILES[name]
        for _ in range(rng.choice((1, 1, 3))):
            content = damage(content, rng)
        try:
            rows = read_bytes(tmp_path, name, content, kind)
        except ValueError as error:
            assert str(error) == f"{name}: no records"
            continue
        if name == "a.jsonl" and not any("UTF-16" in row["problem"] for row in rows):
            written = [line for line in content.split(b"\n") if line.strip()]
            told = {row["where"].split(":")[1] for row in rows}
            # Each line that is not blank is a record or an error of its own place.
            if not content.lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                assert abs(len(told) - len(written)) <= 1
