"""Layouts and their judgement, on records written here."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from one_record import parse_record

from chatllama.text.chat_format import check_messages
from data.reading.records import (
    Conversation,
    Preference,
    Prompt,
    RecordError,
    Text,
    Unusable,
    detect_format,
    record_key,
)

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in pairs]


def hh(*pairs: tuple[str, str]) -> str:
    names = {U: "Human", A: "Assistant"}
    return "".join(f"\n\n{names[role]}: {content}" for role, content in pairs)


SFT_RECORDS: list[tuple[Any, dict[str, Any], list[Any]]] = [
    ("alpaca", {"instruction": "Say hi.", "input": "", "output": "Hi."},
     turns((U, "Say hi."), (A, "Hi."))),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"},
     turns((U, "Add.\n\n1, 2"), (A, "3"))),
    ("alpaca", {"system": "Be kind.", "history": [["a", "b"]], "instruction": "c", "output": "d"},
     turns((S, "Be kind."), (U, "a"), (A, "b"), (U, "c"), (A, "d"))),
    ("messages", {"messages": turns((S, "s"), (U, "a"), (A, "b"))},
     turns((S, "s"), (U, "a"), (A, "b"))),
    ("messages", {"messages": [
        {"role": U, "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}],
         "loss_weight": 0.0},
        {"role": A, "content": "c", "loss_weight": 1.0}]},
     turns((U, "ab"), (A, "c"))),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}]},
     turns((U, "a"), (A, "b"))),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, turns((U, "a"), (A, "b"))),
    ("hh", {"chosen": hh((U, "a"), (A, "b\n\nc")), "rejected": "\n\nHuman: x"},
     turns((U, "a"), (A, "b\n\nc"))),
]  # fmt: skip


@pytest.mark.parametrize(("format", "raw", "expected"), SFT_RECORDS)
def test_conversation_of_each_layout(format: Any, raw: dict[str, Any], expected: list[Any]) -> None:
    record = parse_record(raw, format, "sft", "f:1")
    assert record == Conversation(expected)
    check_messages(expected)
    assert detect_format(raw, "sft", "f:1") == format
    # Its prompt side is a prompt: everything but the last answer.
    assert parse_record(raw, format, "prompts", "f:1") == Prompt(expected[:-1])


PAIR = Preference(turns((U, "q")), ["good", "bad"], [0, 1], [0.0, 0.0])
PAIRS: list[tuple[Any, dict[str, Any]]] = [
    ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    ("preference", {"prompt": turns((U, "q")), "chosen": turns((A, "good")),
                    "rejected": turns((A, "bad"))}),
    ("preference", {"chosen": turns((U, "q"), (A, "good")),
                    "rejected": turns((U, "q"), (A, "bad"))}),
    ("preference", {"prompt": "q", "chosen": turns((U, "q"), (A, "good")),
                    "rejected": turns((U, "q"), (A, "bad"))}),
    ("preference", {"conversations": [{"from": "human", "value": "q"}],
                    "chosen": {"from": "gpt", "value": "good"},
                    "rejected": {"from": "gpt", "value": "bad"}}),
    ("preference", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}),
    ("hh", {"chosen": hh((U, "q"), (A, "good")), "rejected": hh((U, "q"), (A, " bad "))}),
]  # fmt: skip


@pytest.mark.parametrize(("format", "raw"), PAIRS)
def test_pair_of_each_layout(format: Any, raw: dict[str, Any]) -> None:
    assert parse_record(raw, format, "preferences", "f:1") == PAIR
    assert detect_format(raw, "preferences", "f:1") == format
    assert parse_record(raw, format, "sft", "f:1") == Conversation(turns((U, "q"), (A, "good")))
    assert parse_record(raw, format, "prompts", "f:1") == Prompt(turns((U, "q")))


def test_margin_is_read() -> None:
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}
    record = parse_record(raw, "preference", "preferences", "f:1")
    assert isinstance(record, Preference) and record.ratings == [2.0, 0.0]


RANKED: list[tuple[dict[str, Any], list[int], list[float]]] = [
    ({"prompt": "q", "answers": ["a", "b", "c"]}, [0, 1, 2], [0.0, 0.0, 0.0]),
    ({"instruction": "q", "input": "", "output": ["a", "b", "c"]}, [0, 1, 2], [0.0, 0.0, 0.0]),
    ({"messages": turns((U, "q")), "answers": ["a", "b", "c"], "ranks": [1, 1, 5]},
     [0, 0, 1], [0.0, 0.0, 0.0]),
    ({"prompt": "q", "answers": ["a", "b", "c"], "scores": [4, 1.5, 1.5]},
     [0, 1, 1], [4.0, 1.5, 1.5]),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "ranks", "ratings"), RANKED)
def test_ranked_answers(raw: dict[str, Any], ranks: list[int], ratings: list[float]) -> None:
    record = parse_record(raw, "ranked", "preferences", "f:1")
    assert record == Preference(turns((U, "q")), ["a", "b", "c"], ranks, ratings)
    for kind in ("preferences", "sft", "prompts"):
        assert detect_format(raw, kind, "f:1") == "ranked"
    assert parse_record(raw, "ranked", "sft", "f:1") == Conversation(turns((U, "q"), (A, "a")))
    assert parse_record(raw, "ranked", "prompts", "f:1") == Prompt(turns((U, "q")))


def test_prompts_and_text() -> None:
    assert parse_record({"prompt": "q"}, "prompts", "prompts", "f:1") == Prompt(turns((U, "q")))
    history = turns((U, "a"), (A, "b"), (U, "c"))
    assert parse_record({"messages": history}, "prompts", "prompts", "f:1") == Prompt(history)
    alpaca = {"instruction": "q"}
    assert parse_record(alpaca, "alpaca", "prompts", "f:1") == Prompt(turns((U, "q")))
    assert parse_record({"text": " t\n"}, "text", "text", "f:1") == Text(" t\n")


UNUSABLE: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("hh", "preferences", {"chosen": hh((U, "q"), (A, "")), "rejected": hh((U, "q"), (A, "b"))},
     "empty assistant turn"),
    ("hh", "preferences", {"chosen": hh((U, "q"), (A, "a")), "rejected": hh((U, "p"), (A, "b"))},
     "chosen and rejected answer different prompts"),
    ("hh", "preferences", {"chosen": hh((U, "q"), (A, "a")), "rejected": hh((U, "q"), (A, "a "))},
     "chosen equals rejected"),
    ("hh", "sft", {"chosen": hh((U, "q"), (U, "q"), (A, "a")), "rejected": hh((U, "q"))},
     "roles do not alternate between user and assistant"),
    ("messages", "sft", {"messages": turns((U, "q"), (U, "q"), (A, "a"))},
     "roles do not alternate between user and assistant"),
    ("messages", "sft", {"messages": turns((A, "a"))},
     "roles do not alternate between user and assistant"),
    ("messages", "sft", {"messages": turns((U, "q"))}, "the last turn is the user's"),
    ("messages", "sft", {"messages": []}, "no turns"),
    ("messages", "sft", {"messages": turns((S, "s"))}, "no turns"),
    ("messages", "sft", {"messages": turns((U, "q"), ("tool", "t"))}, "role 'tool' (known: "),
    ("messages", "sft", {"messages": [*turns((U, "q")), {"role": A, "content": None,
                                                       "tool_calls": [{}]}]}, "tool calls"),
    ("messages", "sft", {"messages": [*turns((U, "q")), {"role": A, "content": "a",
                                                       "loss_weight": 0.0}]}, "every turn"),
    ("messages", "sft", {"messages": [{"role": U, "content": [{"type": "image"}]}]},
     "content of type 'image'"),
    ("alpaca", "sft", {"instruction": " ", "output": "a"}, "empty user turn"),
    ("text", "text", {"text": "a \ud800"}, "half of a surrogate pair"),
    ("preference", "preferences", {"prompt": "p", "chosen": turns((U, "q"), (A, "a")),
                                   "rejected": turns((U, "q"), (A, "b"))},
     "the conversation does not begin with the prompt"),
    ("ranked", "preferences", {"prompt": "q", "answers": ["a"]}, "fewer than two answers"),
    ("ranked", "preferences", {"prompt": "q", "answers": ["a", " "]}, "empty answer"),
    ("ranked", "preferences", {"prompt": "q", "answers": ["a", "a "]}, "all answers are equal"),
    ("ranked", "preferences", {"prompt": "q", "answers": ["a", "b"], "ranks": [1, 1]},
     "all answers are tied"),
    ("ranked", "sft", {"prompt": "q", "answers": []}, "no answers"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "kind", "raw", "reason"), UNUSABLE)
def test_well_formed_but_unusable(format: Any, kind: Any, raw: Any, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        parse_record(raw, format, kind, "f:1")
    assert str(caught.value).startswith(reason)


HAVE = {
    "prompts": {"prompt": "q"},
    "messages": {"messages": [{"role": "user", "content": "q"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}]},
}


@pytest.mark.parametrize("given", ["preference", "messages", "sharegpt", "alpaca", "turns", "hh"])
@pytest.mark.parametrize("fitting", HAVE)
def test_a_format_that_does_not_fit_is_told_which_one_does(given: Any, fitting: str) -> None:
    if given == fitting:
        return
    raw = HAVE[fitting]
    with pytest.raises(RecordError) as caught:
        parse_record(raw, given, "prompts", "f:7")
    assert str(caught.value).endswith(f" (the record's keys {sorted(raw)} fit format {fitting})")


def test_keys_that_fit_nothing_are_named() -> None:
    for given, kind in (("messages", "sft"), ("preference", "preferences"), ("prompts", "prompts")):
        with pytest.raises(RecordError) as caught:
            parse_record({"question_text": "q"}, cast(Any, given), cast(Any, kind), "f:7")
        said = f"(the record's keys ['question_text'] do not fit format {given})"
        assert str(caught.value).endswith(said)


MALFORMED: list[tuple[Any, Any, Any, str]] = [
    ("alpaca", "sft", {"instruction": "q", "ouput": "a"},
     "f:7: key 'output' is missing; the record has ['instruction', 'ouput']"),
    ("alpaca", "sft", {"instruction": "q", "output": ["a", "b"]},
     "f:7: output: expected a string, got ['a', 'b']"),
    ("alpaca", "sft", ["q", "a"], "f:7: the record: expected an object with keys, got ['q', 'a']"),
    ("alpaca", "sft", {"instruction": "q", "output": None}, "f:7: output: expected a string"),
    ("alpaca", "sft", {"instruction": "q", "output": "a", "history": [["b"]]},
     "f:7: history: expected [question, answer], got ['b']"),
    ("messages", "sft", {"messages": "hi"}, "f:7: messages: expected a list, got 'hi'"),
    ("messages", "sft", {"messages": [{"content": "a"}]},
     "f:7: messages[0]: 'role' must name the speaker, got None"),
    ("messages", "sft", {"messages": [{"role": "user", "content": 3}]},
     "f:7: messages[0].content: expected a string, got 3"),
    ("hh", "preferences", {"chosen": "Human: q", "rejected": "Human: q"},
     "f:7: chosen: a transcript begins with '\\n\\nHuman:', got 'Human: q'"),
    ("preference", "preferences", {"chosen": "a", "rejected": "b"},
     "f:7: an answer alone in 'chosen' needs one of the keys"),
    ("preference", "preferences", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": True},
     "f:7: margin: expected a finite number, got True"),
    ("preference", "preferences",
     {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")},
     "f:7: margin: expected a finite number, got nan"),
    ("ranked", "preferences", {"prompt": "q", "answers": ["a", "b"], "ranks": [2, 1]},
     "f:7: answers: the answers must go from best to worst, their order is [2.0, 1.0]"),
    ("ranked", "preferences", {"prompt": "q", "answers": ["a", "b"], "scores": [1]},
     "f:7: scores: expected one number for each of 2 answers, got [1.0]"),
    ("ranked", "preferences", {"answers": ["a", "b"]}, "f:7: ranked answers need one of the keys"),
    ("alpaca", "preferences", {"instruction": "q", "output": "a"},
     "f:7: format alpaca cannot be used for preferences; formats for preferences: hh, preference"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "kind", "raw", "message"), MALFORMED)
def test_malformed_record_names_its_place(format: Any, kind: Any, raw: Any, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(raw, format, kind, "f:7")
    assert str(caught.value).startswith(message)


def test_long_values_are_shortened() -> None:
    with pytest.raises(RecordError) as caught:
        parse_record({"text": ["x" * 10_000]}, "text", "text", "f:1")
    assert len(str(caught.value)) < 150


def test_detect_refuses_what_fits_nothing() -> None:
    with pytest.raises(
        RecordError, match=r"f:1: no format for sft fits .*\['A', 'X'\].*{prompt: q"
    ):
        detect_format({"X": "q", "A": "a"}, "sft", "f:1")
    with pytest.raises(RecordError, match=r"looks like alpaca.*formats for preferences"):
        detect_format({"instruction": "q", "output": "a"}, "preferences", "f:1")
    with pytest.raises(RecordError, match="expected an object with keys, got 'q'"):
        detect_format("q", "prompts", "f:1")


def test_key_goes_by_the_first_question() -> None:
    short = parse_record({"prompt": "q "}, "prompts", "prompts", "f:1")
    dialogue = Conversation(turns((S, "s"), (U, "q"), (A, "a"), (U, "more"), (A, "b")))
    assert record_key(short) == record_key(dialogue) == record_key(PAIR)
    assert record_key(Prompt(turns((U, "p")))) != record_key(short)
    assert record_key(Text("q")) == record_key(short)
    assert record_key(Text("r")) != record_key(short)


def test_import_is_light() -> None:
    heavy = "'torch' in sys.modules or 'datasets' in sys.modules"
    code = f"import sys, data.reading.records; sys.exit({heavy})"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
