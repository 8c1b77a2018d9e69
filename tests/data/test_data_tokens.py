"""Records as tokens: what is masked, cut, left out, padded and put into batches."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource
from chatllama.text.chat_format import render
from chatllama.text.encoding import decode, encode
from chatllama.text.padding import pad_left, pad_right
from chatllama.text.tokenizer import load_tokenizer
from data.batches import (
    PreferenceCollator,
    batch_indices,
    bucket_by_length,
    fill_rate,
    ordered_pairs,
)
from data.mixture import load_mixture
from data.token_report import TokenReport
from data.tokenize import tokenize, tokenize_text

pytestmark = pytest.mark.usefixtures("data_cache")

CHAT = ChatSection(template="llama2")
EOS = 2


def turns(*contents: str) -> list[Any]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def records(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def trained_text(example: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    pairs = zip(example["input_ids"], example["mask"], strict=True)
    return decode(tokenizer, [token for token, trained in pairs if trained])


def test_only_answers_are_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    data = records({"messages": turns("the river", "a garden", "the market", "a quiet child")})
    examples, report = tokenize(data, "sft", tokenizer, CHAT, 200)
    assert set(examples.column_names) == {"input_ids", "mask"}
    assert trained_text(examples[0], tokenizer).split() == ["a", "garden", "a", "quiet", "child"]
    pairs = zip(examples[0]["input_ids"], examples[0]["mask"], strict=True)
    assert [trained for token, trained in pairs if token == EOS] == [1, 1]
    assert (report.num_read, report.num_kept, report.changed, report.left_out) == (1, 1, {}, {})


PLACE = {"where": "x.jsonl:1", "columns": '{"answer": 4}'}


def test_the_models_positions_are_a_limit_in_every_stage(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(tokenizer), "max_positions", 30)
    long, prompt = "the river " * 60, turns("the river")
    answers = {
        "prompt": prompt,
        "answers": [long, "a garden"],
        "ranks": [0, 1],
        "ratings": [0.0, 0.0],
        "where": "x",
    }
    examples, report = tokenize(
        records({"messages": turns("Hi", long)}), "sft", tokenizer, CHAT, 99
    )
    assert len(examples[0]["input_ids"]) == 30 and report.changed == {"cut inside the answer": 1}
    with pytest.raises(ValueError, match="an answer is over 30 tokens"):
        tokenize(records(answers), "preferences", tokenizer, CHAT, 99)
    with pytest.raises(ValueError, match="over 30 tokens"):
        tokenize(records(PLACE | {"messages": turns(long)}), "prompts", tokenizer, CHAT, 99)
    texts, _ = tokenize_text(records({"text": long}), tokenizer, 99)
    assert max(map(len, texts["input_ids"])) == 30


def test_long_conversations_lose_exchanges_then_their_answers_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    system: list[Any] = [{"role": "system", "content": "ask"}]
    two = system + turns("the river", "a garden", "the market", "a quiet child")
    first = render(tokenizer, CHAT, two[:3]).ids
    both = render(tokenizer, CHAT, two).ids
    prompt = render(tokenizer, CHAT, two[:2], add_generation_prompt=True).ids
    data = records({"messages": two})

    def limited(max_length: int) -> tuple[list[int], dict[str, int]]:
        examples, report = tokenize(data, "sft", tokenizer, CHAT, max_length)
        return examples[0]["input_ids"], report.changed

    assert limited(len(both)) == (both, {})
    assert limited(len(both) - 1) == (first, {"lost whole exchanges at the end": 1})
    assert limited(len(first)) == (first, {"lost whole exchanges at the end": 1})
    ids, changed = limited(len(first) - 1)
    assert ids == first[:-1] and EOS not in ids and changed == {"cut inside the answer": 1}
    with pytest.raises(ValueError, match=f"no record can be used .*no answer within {len(prompt)}"):
        limited(len(prompt))


@pytest.mark.parametrize(
    ("kind", "key"),
    [("sft", "sft.max_length"), ("preferences", "reward.max_length"),
     ("prompts", "ppo.max_prompt_length")],
)  # fmt: skip
def test_the_limit_that_most_need_is_told(
    tokenizer: PreTrainedTokenizerFast, kind: Any, key: str
) -> None:
    """20 records of growing length; 19 of them are 95 %."""

    def record(words: int) -> dict[str, Any]:
        text = "river " * words
        if kind == "preferences":
            prompt, answers = turns("a", "b")[:1], [text, "no"]
            ranked = {"ranks": [0, 1], "ratings": [0.0, 0.0], "where": "f:1"}
            return {"prompt": prompt, "answers": answers, **ranked}
        if kind == "prompts":
            return PLACE | {"messages": turns(text, "b")[:1]}
        return {"messages": turns("a", text)}

    data = records(*(record(words) for words in range(1, 21)))
    length: list[int] = []
    for words in range(1, 21):
        _, report = tokenize(records(record(words)), kind, tokenizer, CHAT, 10_000)
        length.append(report.most_need)
    assert length == sorted(set(length))
    for limit, over in ((length[-1], 0), (length[-1] - 1, 1), (length[9], 10)):
        _, report = tokenize(data, kind, tokenizer, CHAT, limit)
        assert (report.num_over, report.most_need) == (over, length[18]), limit
    with pytest.raises(ValueError) as caught:
        tokenize(data, kind, tokenizer, CHAT, 1)
    assert str(caught.value).endswith(f". {key}={length[18]} keeps 95% whole")
    with pytest.raises(ValueError, match=f"ppo.ptx_max_length={length[18]} keeps"):
        tokenize(data, kind, tokenizer, CHAT, 1, "ppo.ptx_max_length")


@pytest.mark.parametrize(
    ("limit", "need", "positions", "new", "expected"),
    [
        (256, 300, 512, 0, "K=300 keeps 95% whole"),
        (256, 300, None, 0, "K=300 keeps 95% whole"),
        (256, 512, 512, 0, "K=512 keeps 95% whole"),
        # the limit is all that the model reads: no value of the key helps
        (512, 1300, 512, 0, "95% of them need 1,300 tokens, and the model reads 512: split or"),
        (256, 513, 512, 0, "K=512 keeps more, and no value all: 95% of them need 513 tokens"),
        # 300 + 256 new tokens would be refused
        (256, 300, 512, 256, "95% of them need 300 tokens, and the model reads 512, 256 of them"),
        (256, 300, 512, 256, "new ones: lower generation.max_new_tokens, split or shorten"),
        (64, 300, 512, 256, "K=256 keeps more"),
        (64, 256, 512, 256, "K=256 keeps 95% whole"),
    ],
)
def test_no_value_is_advised_that_is_set_or_cannot_be(
    limit: int, need: int, positions: int | None, new: int, expected: str
) -> None:
    report = TokenReport(9, 1, {}, {}, num_over=8, limit=limit, most_need=need, positions=positions)
    assert expected in report.advice("K", new)
    assert f"K={limit} " not in report.advice("K", new)


def test_left_out_and_changed_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    fits, cut = turns("a", "b"), turns("a", "the river " * 20)
    data = records(*({"messages": m} for m in (fits, turns("the river " * 40, "b"), cut, fits)))
    examples, report = tokenize(data, "sft", tokenizer, CHAT, 60)
    assert max(len(ids) for ids in examples["input_ids"]) == 60
    assert (report.num_read, report.num_kept) == (4, 3)
    assert report.changed == {"cut inside the answer": 1}
    assert report.left_out == {"no answer within 60 tokens": 1}
    assert report.facts == {"examples": 3, "examples_changed": 1, "examples_left_out": 1}
    assert report.summary() == (
        "3 of 4 examples; 1 cut inside the answer; 1 left out: no answer within 60 tokens"
    )


def test_text_has_bos_and_eos_once_and_loses_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    data = records({"text": "the river</s>"}, {"text": "a"})
    ids = [[1, *encode(tokenizer, text), EOS] for text in ("the river</s>", "a")]
    assert ids[0].count(EOS) == 1
    examples, report = tokenize_text(data, tokenizer)
    assert examples["input_ids"][:] == ids and report.changed == {}
    pieces, report = tokenize_text(data, tokenizer, max_length=4)
    assert max(len(piece) for piece in pieces["input_ids"]) <= 4
    assert [token for piece in pieces["input_ids"] for token in piece] == ids[0] + ids[1]
    assert report.changed == {"more examples by cutting long texts": len(pieces) - 2}


def ranked(*answers: str, ranks: Any = None, margin: float = 0.0) -> dict[str, Any]:
    return {
        "prompt": turns("the river"),
        "answers": list(answers),
        "ranks": ranks or list(range(len(answers))),
        "ratings": [margin, *[0.0] * (len(answers) - 1)],
        "where": "f:3",
    }


def test_answers_share_their_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    examples, _ = tokenize(
        records(ranked("a garden", "the market", margin=1.5)), "preferences", tokenizer, CHAT, 200
    )
    row = examples[0]
    assert set(row) == {"answer_ids", "ranks", "ratings", "prompt_length", "where"}
    prompt = render(tokenizer, CHAT, turns("the river"), add_generation_prompt=True).ids
    better, worse = row["answer_ids"]
    assert better == render(tokenizer, CHAT, turns("the river", "a garden")).ids
    assert worse == render(tokenizer, CHAT, turns("the river", "the market")).ids
    assert row["prompt_length"] == len(prompt) and row["where"] == "f:3"
    assert row["ranks"] == [0, 1] and row["ratings"] == [1.5, 0.0]
    assert better[: len(prompt)] == prompt == worse[: len(prompt)]
    assert better[-1] == worse[-1] == EOS


def test_long_and_identical_answers_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    longest = len(render(tokenizer, CHAT, turns("the river", "a garden")).ids)
    data = records(
        ranked("a garden", "a"),
        ranked("a", "a garden."),
        ranked("a ", "a"),
        ranked("a", "a garden.", "a garden", "a"),  # loses the second and the last
        ranked("a garden.", "a", "a garden", ranks=[0, 1, 1]),  # a tie remains
    )
    examples, report = tokenize(data, "preferences", tokenizer, CHAT, longest)
    assert [row["ranks"] for row in examples.to_list()] == [[0, 1], [0, 2]]
    assert report.left_out == {
        f"an answer is over {longest} tokens": 2,
        "answers are the same tokens": 1,
    }
    assert report.changed == {f"shortened: an answer is over {longest} tokens": 1}


def test_prompts_are_open_for_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue, long = turns("the river", "a", "the market"), turns("a garden " * 30)
    data = records(PLACE | {"messages": dialogue}, PLACE | {"messages": long})
    examples, report = tokenize(data, "prompts", tokenizer, CHAT, 60)
    assert examples[0]["messages"] == dialogue and examples[0]["columns"] == '{"answer": 4}'
    assert examples["text"][:] == ["the market"]
    expected = render(tokenizer, CHAT, dialogue, add_generation_prompt=True).ids
    assert examples["input_ids"][:] == [expected]
    assert report.left_out == {"over 60 tokens": 1}


def test_another_layout_does_not_come_from_the_cache(tokenizer: PreTrainedTokenizerFast) -> None:
    mixture = load_mixture([DataSource(path="data/samples/prompts.jsonl")], [], 0.0, 0, "prompts")
    for chat in (CHAT, ChatSection(template="vicuna"), ChatSection(system="Be brief."), CHAT):
        examples, _ = tokenize(mixture.train, "prompts", tokenizer, chat, 600)
        messages = mixture.train[0]["messages"]
        expected = render(tokenizer, chat, messages, add_generation_prompt=True).ids
        assert examples[0]["input_ids"] == expected


def test_padding_on_either_side_is_masked_by_position() -> None:
    rows = [[5, 0, 7], [0], [3, 0]]  # 0 is a real token here, and the pad id
    ids, mask = pad_right(rows, 0)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.tolist() == [[5, 0, 7], [0, 0, 0], [3, 0, 0]]
    assert mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    ids, mask = pad_left(rows, 9)
    assert ids.tolist() == [[5, 0, 7], [9, 9, 0], [9, 3, 0]]
    assert mask.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_every_pair_of_a_list_but_ties() -> None:
    assert ordered_pairs([0, 1]) == [(0, 1)]
    assert ordered_pairs([0, 0, 1]) == [(0, 2), (1, 2)]
    assert len(ordered_pairs(range(9))) == 36  # C(9, 2)


def test_collator_holds_every_answer_once_and_weighs_prompts_alike() -> None:
    examples: list[dict[str, Any]] = [
        {"answer_ids": [[1, 4, 2], [1, 2]], "ranks": [0, 1], "ratings": [0.5, 0.0]},
        {
            "answer_ids": [[1, 5], [1, 6, 7, 2], [1, 8]],
            "ranks": [0, 0, 2],
            "ratings": [3.0, 3.0, 1.0],
        },
    ]
    (ids, mask), pairs = PreferenceCollator(pad_id=0)(examples)
    assert ids.tolist() == [[1, 4, 2, 0], [1, 2, 0, 0], [1, 5, 0, 0], [1, 6, 7, 2], [1, 8, 0, 0]]
    assert mask.sum(dim=1).tolist() == [3, 2, 2, 4, 2]
    assert pairs.better.tolist() == [0, 2, 3] and pairs.worse.tolist() == [1, 4, 4]
    assert pairs.margin.tolist() == [0.5, 2.0, 2.0] and pairs.margin.dtype == torch.float32
    assert pairs.weight.tolist() == [1.0, 0.5, 0.5] and pairs.prompt.tolist() == [0, 1, 1]


def test_steps_cover_each_epoch_before_the_next() -> None:
    stream = [i for step in range(15) for i in batch_indices(10, 4, step, seed=3)]
    epochs = [stream[begin : begin + 10] for begin in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert batch_indices(10, 4, 2, seed=3) == stream[8:12]  # whatever was asked before
    assert batch_indices(10, 4, 2, seed=4) != stream[8:12]
    assert sorted(batch_indices(3, 9, 0, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="num_examples = 0"):
        batch_indices(0, 4, 0, seed=0)


def test_buckets_and_fill_rate_by_hand() -> None:
    lengths = [5, 1, 3, 9, 2, 4, 7]
    assert bucket_by_length(lengths, 3) == [1, 2, 0, 4, 5, 3, 6]  # 1 3 5, 2 4 9, 7
    assert bucket_by_length([2, 2, 1], 3) == [2, 0, 1]
    # Microbatches of 2: 5 1, 3 9, 2 4, 7 take 10 + 18 + 8 + 7 positions for 31 tokens.
    assert fill_rate(lengths, 2) == pytest.approx(31 / 43)


def test_real_pairs_become_tokens(testdata: Path) -> None:
    file = str(testdata / "hh_rlhf/harmless-base-first1800.jsonl.gz")
    tokenizer = load_tokenizer(testdata / "stories260k/hf")
    mixture = load_mixture([DataSource(path=file)], [], 1 / 6, 0, "preferences")
    assert len(mixture.train) + len(mixture.held_out) == 1791
    assert 250 < len(mixture.held_out) < 350  # 298.5 expected, deviation 16
    some = mixture.train.select(range(100))
    examples, report = tokenize(some, "preferences", tokenizer, CHAT, 512)
    assert report.num_read == 100 and report.num_kept == len(examples) > 50
    assert report.num_kept + sum(report.left_out.values()) == 100
    for row in examples.to_list():
        prompt = slice(0, row["prompt_length"])
        better, worse = row["answer_ids"]
        assert max(len(better), len(worse)) <= 512
        assert better[prompt] == worse[prompt]
        assert better[-1] == worse[-1] == EOS


def test_real_ranked_lists_become_tokens(testdata: Path) -> None:
    file = str(testdata / "oasst/oaast_rm_zh.json")
    mixture = load_mixture([DataSource(path=file)], [], 0.0, 0, "preferences")
    assert {report.format for report in mixture.reports} == {"ranked"}
    tokenizer = load_tokenizer(testdata / "stories260k/hf")
    some = mixture.train.select(range(30))
    examples, report = tokenize(some, "preferences", tokenizer, CHAT, 4096)
    # 4096 tokens were asked for, and the model has 512 positions.
    assert report.num_kept == 16
    assert report.left_out == {"an answer is over 512 tokens": 14}
    assert max(len(ids) for ids in examples["answer_ids"][:]) > 2
