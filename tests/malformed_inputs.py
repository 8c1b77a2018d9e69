"""Inputs that are wrong in one place each, and the invariant that every input must keep."""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatllama.config.sources import DataSource
from data.reading.decode import decode
from data.reading.files import DataFile
from data.reading.records import Kind
from data.reading.source import GOOD, MALFORMED, UNUSABLE, _rows

U, A = "user", "assistant"


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


GOOD_SFT = {"messages": [message(U, "q"), message(A, "a")]}
GOOD_PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
GOOD_ALPACA = {"instruction": "q", "input": "", "output": "a"}


@dataclass(frozen=True)
class Bad:
    """A file with a defect, what it is read for, and the place and words of the error."""

    name: str
    content: bytes
    where: str
    words: str
    kind: Kind = "sft"
    options: dict[str, Any] = field(default_factory=dict)


def second(row: Any, words: str, kind: Kind = "sft", good: Any = GOOD_SFT) -> Bad:
    """A defect in the second line of three."""
    return Bad("a.jsonl", lines(good, row, good), "a.jsonl:2", words, kind)


def raw(line: bytes, words: str) -> Bad:
    """A second line that is no record."""
    good = lines(GOOD_SFT)
    return Bad("a.jsonl", good + line + b"\n" + good, "a.jsonl:2", words)


def turns(*each: Any) -> dict[str, Any]:
    return {"messages": list(each)}


PACKED = gzip.compress(lines(*[GOOD_SFT] * 9))
TWO = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1}
RANKED = {"prompt": "q", "answers": ["a", "b"]}
KTO = {**GOOD_SFT, "label": True}
BASE: list[Bad] = [
    # Not decodable.
    raw(b'{"messages": ', "broken JSON"),
    raw(b'{"messages": []} x', "broken JSON"),
    raw(b"{'messages': []}", "broken JSON"),
    raw(b'{"messages": [],}', "broken JSON"),
    raw(b'{"a": "\x01"}', "broken JSON"),
    raw(b'{"a": "\xff"}', "not UTF-8"),
    raw('{"a": "caf\u00e9"}'.encode("latin-1"), "as latin-1 it reads"),
    raw(b'{"a": 1, "a": 2}', "is twice in one object"),
    raw(b"[" * 50_000, "nested too deeply"),
    raw(b'{"a": ' + b"1" * 5000 + b"}", "broken JSON"),
    raw(b'{"a": "\\u12"}', "broken JSON"),
    raw(b'{"a": tru}', "broken JSON"),
    raw(b"\x00\x00", "broken JSON"),
    raw(b"plain text", "broken JSON"),
    Bad("a.jsonl", lines(GOOD_SFT).decode().encode("utf-16"), "a.jsonl:1", "this is UTF-16"),
    Bad("a.json", json.dumps(GOOD_SFT, indent=1).encode(), "a.json:1", "an array, or one object"),
    Bad("a.json", b"[\n" + lines(GOOD_SFT)[:-1] + b",\n{", "a.json:3", "broken JSON"),
    Bad("a.json", b"[\n{\n\n\"a\": 1\n\"b\": 2}]", "a.json:5", "Expecting ',' delimiter"),
    Bad("a.json", b'[{"messages": "x', "a.json:1", "Unterminated string"),
    Bad("a.json", b"[", "a.json:1", "broken JSON"),
    Bad("a.json", b'[\n{"a" 1},\n{"b": "\xff"}]', "a.json:2", "Expecting ':' delimiter"),
    Bad("a.json", b"[\n" + lines(GOOD_SFT)[:-1] + b",\n]", "a.json:3", "broken JSON"),
    Bad("a.json", b"[\n" + lines(GOOD_SFT) + b"]\n\n]", "a.json:5", "Extra data"),
    Bad("a.json", b"[" + lines(GOOD_SFT)[:-1] + b"\n{}]", "a.json:2", "Expecting ',' delimiter"),
    Bad("a.json", b'[{"a": 1, "a": 2}]', "a.json:1", "is twice in one object"),
    Bad("a.json", b"[] [2]", "a.json:1", "Extra data"),
    Bad("a.json", b"", "a.json", "no records"),
    Bad("a.json", b"[]", "a.json", "no records"),
    Bad("a.jsonl", b"\n \n\n", "a.jsonl", "no records"),
    Bad("a.jsonl.gz", PACKED[:-20], "a.jsonl.gz", "cannot be read after this"),
    Bad("a.jsonl.gz", b"\x1f\x8bgarbage", "a.jsonl.gz", "cannot be read after this"),
    Bad("a.jsonl.gz", lines(GOOD_SFT), "a.jsonl.gz", "cannot be read after this"),
    Bad("a.jsonl.bz2", lines(GOOD_SFT), "a.jsonl.bz2", "cannot be read after this"),
    Bad("a.jsonl.xz", lines(GOOD_SFT), "a.jsonl.xz", "cannot be read after this"),
    Bad("a.jsonl.zst", lines(GOOD_SFT), "a.jsonl.zst", "cannot be read after this"),
    Bad("a.parquet", b"PAR1 no table PAR1", "a.parquet", "cannot be read after this"),
    Bad("a.parquet", b"", "a.parquet", "cannot be read after this"),
    Bad("a.xml", b"<a/>", "a.xml", "unknown file type"),
    Bad("a.txt", b"one\n\n\xfftwo\n", "a.txt:3", "not UTF-8", "text"),
    # Tables.
    Bad("a.csv", b"Q,A\nq,a\nq\n", "a.csv:3", "1 cells under a header of 2"),
    Bad("a.csv", b"Q,A\nq,a,b\n", "a.csv:2", "3 cells under a header of 2"),
    Bad("a.csv", b'Q,A\nq,"a\nb\n', "a.csv:2", "unexpected end of data"),
    Bad("a.csv", b'Q,A\nq,"a"b\n', "a.csv:2", "expected after"),
    Bad("a.csv", b"Q,Q\nq,a\n", "a.csv:1", "twice in the header"),
    Bad("a.csv", b"Q,\nq,a\n", "a.csv:1", "without a name"),
    Bad("a.csv", b"Q;A\nq;a\n", "a.csv:1", "is the delimiter ';'?"),
    Bad("a.csv", b"Q\tA\nq\ta\n", "a.csv:1", "name the file .tsv"),
    Bad("a.tsv", b"Q,A\nq,a\n", "a.tsv:1", "name the file .csv"),
    Bad("a.csv", b"Q,A\nq,a\nq,\xff\n", "a.csv:3", "not UTF-8"),
    Bad("a.csv", b"Q,A\n", "a.csv", "no records"),
    Bad("a.csv", b"Q,A\nq, \n", "a.csv:2", "empty assistant turn"),
    Bad("a.csv", b"x,y\n1,2\n", "a.csv:2", "no format for sft fits"),
    Bad("a.jsonl", lines(GOOD_SFT), "a.jsonl", "`columns` is for csv", "sft", {"columns": ["a"]}),
    # Decodable, and not what the format says.
    second([1], "expected an object"),
    second("text", "expected an object"),
    second(None, "expected an object"),
    second({}, "expected a list, got None"),
    second({"messages": {}}, "expected a list"),
    second({"messages": [[]]}, "expected an object"),
    second(turns(message(None, "q")), "must name the speaker"),
    second(turns(message(U, None)), "expected a string"),
    second(turns(message(U, 3.5)), "expected a string"),
    second(turns(message(U, [3])), "expected an object"),
    second(turns({"role": U}), "expected a string, got None"),
    second({**GOOD_SFT, "system": 3}, "system: expected a string"),
    second({"instruction": "q"}, "key 'output' is missing", "sft", GOOD_ALPACA),
    second({**GOOD_ALPACA, "input": 3}, "input: expected a string", "sft", GOOD_ALPACA),
    second({**GOOD_ALPACA, "history": [1]}, "history: expected a list", "sft", GOOD_ALPACA),
    second({**GOOD_ALPACA, "output": {}}, "output: expected a string", "sft", GOOD_ALPACA),
    second({"prompt": "q"}, "chosen: expected a list", "preferences", GOOD_PAIR),
    second({**GOOD_PAIR, "margin": "high"}, "margin: expected", "preferences", GOOD_PAIR),
    second({**GOOD_PAIR, "chosen": []}, "does not begin with the prompt", "preferences", GOOD_PAIR),
    second({**TWO, "preference": 9}, "preference: expected", "preferences", TWO),
    second({**TWO, "output_2": None}, "rejected: expected", "preferences", TWO),
    second({**RANKED, "ranks": [1, 0]}, "best to worst", "preferences", RANKED),
    second({**RANKED, "scores": [1]}, "one number for each", "preferences", RANKED),
    second({**RANKED, "answers": "ab"}, "expected a list", "preferences", RANKED),
    second({**KTO, "label": "maybe"}, "expected true or false", "sft", KTO),
    second({"turns": "q"}, "turns: expected a list", "prompts", {"turns": ["q"]}),
    second({"instances": {}}, "expected a list", "sft",
           {"instruction": "q", "instances": [{"input": "", "output": "a"}]}),
    second({"utterances": [{"name": 1, "text": "q"}]}, "must name the speaker", "sft",
           {"utterances": [{"name": U, "text": "q"}, {"name": "agent", "text": "a"}]}),
    # Well-formed, and of no use.
    second(turns(message("narrator", "q")), "role 'narrator'"),
    second(turns(message(U, "q")), "the last turn is the user's"),
    second(turns(message(A, "q")), "do not alternate"),
    second(turns(message(U, "q"), message(A, "\t")), "empty assistant turn"),
    second(turns(message(U, [{"type": "image"}]), message(A, "a")), "content of type"),
    second(turns(message(U, "\ud83d"), message(A, "a")), "half of a surrogate"),
    second({**GOOD_PAIR, "rejected": "a"}, "chosen equals rejected", "preferences", GOOD_PAIR),
    second({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
           "different prompts", "preferences",
           {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
]  # fmt: skip


def read_bytes(
    folder: Path, name: str, content: bytes, kind: Kind, **options: Any
) -> list[dict[str, Any]]:
    """Rows of a file with this content; asserts that nothing is lost and everything has a place.

    Raises:
        ValueError: from the reader, and it names the file.
    """
    file = folder / name
    file.write_bytes(content)
    source = DataSource.model_validate({"path": name, **options})
    decoded = list(decode(DataFile(file, name), source))
    try:
        rows: list[dict[str, Any]] = list(_rows(lambda: iter(decoded), source, kind))
    except ValueError as error:
        assert not decoded and name in str(error)
        raise
    assert {row["number"] for row in rows} == set(range(len(decoded)))
    for row in rows:
        assert row["where"].startswith(name)
        assert (row["severity"] == GOOD) == (row["problem"] == "")
        assert row["severity"] in (GOOD, UNUSABLE, MALFORMED)
        if row["severity"] == MALFORMED:
            assert row["problem"].startswith(name)
        else:
            assert row["format"]
        if row["severity"] == GOOD:
            assert row["key"]
    return rows
