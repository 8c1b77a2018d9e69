"""Formats that are translated into another, and columns that the config names."""

from typing import Any

import pytest
from one_record import parse_record

from chatllama.config.sources import ColumnMapping
from data.reading.formats import RecordError, Unusable
from data.reading.records import (
    Conversation,
    Kind,
    Preference,
    Prompt,
    Text,
    detect_format,
    parse_records,
)

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in pairs]


QA = Conversation(turns((U, "q"), (A, "good")))
PAIR = Preference(turns((U, "q")), ["good", "bad"], [0, 1], [0.0, 0.0])

SFT: list[tuple[str, dict[str, Any]]] = [
    ("question_answer", {"Q": "q", "A": "good", "label": "2  "}),
    ("question_answer", {" Question": "q", "ANSWER ": "good"}),
    ("question_answer", {"query": "q", "response": "good"}),
    ("utterances", {"utterances": [{"name": "user", "text": "q"},
                                   {"name": "agent", "text": "good"}]}),
    ("self_instruct", {"instruction": "q", "instances": [{"input": "", "output": "good"}]}),
    ("kto", {"messages": turns((U, "q"), (A, "good")), "label": True}),
    ("kto", {"prompt": "q", "completion": "good", "label": True}),
    ("kto", {"instruction": "q", "output": "good", "label": True}),
]  # fmt: skip


@pytest.mark.parametrize(("format", "raw"), SFT)
def test_conversations(format: Any, raw: dict[str, Any]) -> None:
    assert detect_format(raw, "sft", "f:1") == format
    assert parse_record(raw, format, "sft", "f:1") == QA
    assert detect_format(raw, "prompts", "f:1") == format
    assert parse_record(raw, format, "prompts", "f:1") == Prompt(turns((U, "q")))


def test_every_instance_is_a_record() -> None:
    instances = [{"input": "1", "output": "a"}, {"input": "2", "output": " "}]
    raw = {"instruction": "do", "instances": instances}
    (first, second) = parse_records(raw, "self_instruct", "sft", "f:3")
    assert first == ("f:3 (instance 1 of 2)", Conversation(turns((U, "do\n\n1"), (A, "a"))))
    assert second[0] == "f:3 (instance 2 of 2)" and str(second[1]) == "empty assistant turn"
    ((_, none),) = parse_records({**raw, "instances": []}, "self_instruct", "sft", "f:3")
    assert str(none) == "no instances"


def two(verdict: Any, key: str = "preference", names: Any = ("output_1", "output_2")) -> Any:
    return {"instruction": "q", "input": "", names[0]: "good", names[1]: "bad", key: verdict}


COMPARED: list[dict[str, Any]] = [
    two(1),
    two(1.0),
    two(1.3),  # AlpacaEval: 1 + probability that the second is better
    two("1"),
    two(1, "label", ("response1", "response2")),
    two("model_a", "winner", ("response_a", "response_b")),
    two(0, "better_response_id", ("response_0", "response_1")),
    {"input": "q", "output_1": "good", "output_2": "bad", "label": 1},  # LLMBar
    {"instruction": "q", "input": "", "response1": "bad", "response2": "good",
     "annotator1": 2, "annotator2": 1, "annotator3": 2},  # PandaLM
    {"instruction": "q", "output_1": "bad", "output_2": "good", "preference": 1.9},
    {"conversation_a": turns((U, "q"), (A, "bad")), "conversation_b": turns((U, "q"), (A, "good")),
     "winner": "model_b", "turn": 1},  # MT-Bench's judgements
]  # fmt: skip


@pytest.mark.parametrize("raw", COMPARED)
def test_two_answers_and_a_verdict(raw: dict[str, Any]) -> None:
    assert detect_format(raw, "preferences", "f:1") == "comparison"
    assert parse_record(raw, "comparison", "preferences", "f:1") == PAIR
    assert parse_record(raw, "comparison", "sft", "f:1") == QA


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (two(1.5), "a tie"),
        (two("tie (bothbad)", "winner"), "a tie"),
        ({**two(1), "annotator1": 1, "annotator2": 2}, "the annotators disagree"),
    ],
)
def test_ties_are_unusable(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse_record(raw, "comparison", "preferences", "f:1")


@pytest.mark.parametrize("verdict", [3, -1, 0.5, True, None, "first", float("nan"), [1]])
def test_strange_verdicts_are_malformed(verdict: Any) -> None:
    with pytest.raises(RecordError, match=r"f:9: preference: .*`verdicts`"):
        parse_record(two(verdict), "comparison", "preferences", "f:9")


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter", "text": "q", "replies": [
            {"role": "assistant", "text": "bad", "rank": 1, "replies": []},
            {"role": "assistant", "text": "good", "rank": 0, "replies": [
                {"role": "prompter", "text": "more", "replies": [
                    {"role": "assistant", "text": "only", "rank": None, "replies": []}]},
                {"role": "prompter", "text": "unanswered", "replies": []},
            ]},
        ],
    },
}  # fmt: skip


BARE: list[tuple[Kind, str]] = [
    ("sft", "no answers in the tree"),
    ("preferences", "no ranked answers"),
]


def test_trees_give_threads_prompts_and_rankings() -> None:
    assert detect_format(TREE, "sft", "f:1") == "oasst"
    best = turns((U, "q"), (A, "good"))
    thread = Conversation([*best, *turns((U, "more"), (A, "only"))])
    assert parse_records(TREE, "oasst", "sft", "f:1") == [("f:1", thread)]
    prompts = parse_records(TREE, "oasst", "prompts", "f:1")
    assert [record for _, record in prompts] == [
        Prompt(turns((U, "q"))),
        Prompt([*best, *turns((U, "more"))]),
        Prompt([*best, *turns((U, "unanswered"))]),
    ]
    assert prompts[2][0] == "f:1 (thread 3 of 3)"
    assert parse_records(TREE, "oasst", "preferences", "f:1") == [("f:1", PAIR)]
    bare = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q"}}
    for kind, reason in BARE:
        with pytest.raises(Unusable, match=reason):
            parse_record(bare, "oasst", kind, "f:1")


def test_questions_of_several_turns_give_the_first() -> None:
    raw = {"question_id": 81, "category": "writing", "turns": ["q", "again"]}
    assert detect_format(raw, "prompts", "f:1") == "turns"
    assert parse_record(raw, "turns", "prompts", "f:1") == Prompt(turns((U, "q")))
    with pytest.raises(Unusable, match="no turns"):
        parse_record({"turns": []}, "turns", "prompts", "f:1")


def test_lines_are_text_or_prompts() -> None:
    assert parse_record({"text": "a"}, "lines", "text", "f:1") == Text("a")
    assert parse_record({"text": "a"}, "lines", "prompts", "f:1") == Prompt(turns((U, "a")))


def test_labels() -> None:
    bad = {"messages": turns((U, "q"), (A, "bad")), "label": False}
    with pytest.raises(Unusable, match="labelled as a bad answer"):
        parse_record(bad, "kto", "sft", "f:1")
    assert parse_record({**bad, "label": "1"}, "kto", "sft", "f:1")
    for label in (None, 2, "good", 0.5):
        with pytest.raises(RecordError, match="label: expected true or false"):
            parse_record({**bad, "label": label}, "kto", "sft", "f:1")
    assert parse_record(bad, "messages", "sft", "f:1")  # named: all answers alike


MAPPED: list[tuple[dict[str, str], Kind, dict[str, Any], Any]] = [
    ({"prompt": "question", "completion": "best"}, "sft", {"question": "q", "best": "good"}, QA),
    ({"prompt": "d.q", "completion": "d.a.1"}, "sft", {"d": {"q": "q", "a": ["bad", "good"]}}, QA),
    ({"prompt": "a.b", "completion": "x"}, "sft", {"a.b": "q", "x": "good", "text": 3}, QA),
    ({"instruction": "i", "input": "n", "output": "o"}, "sft", {"i": "q", "o": "good"}, QA),
    ({"prompt": "i", "system": "s", "completion": "o"}, "sft", {"i": "q", "s": "", "o": "good"},
     QA),
    ({"prompt": "i", "system": "s", "completion": "o"}, "sft", {"i": "q", "s": "S", "o": "good"},
     Conversation(turns((S, "S"), (U, "q"), (A, "good")))),
    ({"prompt": "i", "completion": "o"}, "prompts", {"i": "q"}, Prompt(turns((U, "q")))),
    ({"prompt": "i", "chosen": "c", "rejected": "r"}, "preferences",
     {"i": "q", "c": "good", "r": "bad"}, PAIR),
    ({"prompt": "i", "output_1": "x", "output_2": "y", "preference": "p"}, "preferences",
     {"i": "q", "x": "bad", "y": "good", "p": 2}, PAIR),
    ({"prompt": "i", "answers": "a"}, "preferences", {"i": "q", "a": ["good", "bad"]}, PAIR),
    ({"prompt": "i", "completion": "o", "label": "ok"}, "sft", {"i": "q", "o": "good", "ok": "1"},
     QA),
    ({"text": "review"}, "text", {"review": "t", "rating": 3}, Text("t")),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "kind", "raw", "expected"), MAPPED)
def test_columns_that_the_config_names(
    columns: dict[str, str], kind: Kind, raw: dict[str, Any], expected: Any
) -> None:
    assert parse_record(raw, ColumnMapping(**columns), kind, "f:1") == expected


def test_mapping_errors_name_column_and_place() -> None:
    columns = ColumnMapping(prompt="q", completion="a")
    for raw, wrong in (({"q": "x"}, "is missing"), ({"q": "x", "a": None}, "is null")):
        with pytest.raises(RecordError, match=rf"f:4: column 'a' \(format.completion\) {wrong}"):
            parse_record(raw, columns, "sft", "f:4")
    with pytest.raises(RecordError, match=r"f:4: the columns \['prompt'\] make no record for sft"):
        parse_record({"q": "x"}, ColumnMapping(prompt="q"), "sft", "f:4")
    with pytest.raises(RecordError, match="f:4: prompt: expected a list, got 3"):
        parse_record({"q": 3, "a": "b"}, columns, "sft", "f:4")
