"""Splits that never move, proportions that are exact."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from chatllama.config.sources import DataSource
from data.batches import batch_indices
from data.decontaminate import build_index
from data.mixture import load_mixture, source_counts
from data.reading.source import read_source
from data.similarity import words

pytestmark = pytest.mark.usefixtures("data_cache")


def source(file: Path, texts: list[str], **options: Any) -> DataSource:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSource(path=str(file), **options)


def texts(data: Any) -> list[str]:
    return data["text"][:]


A, B = [f"a{i}" for i in range(100)], [f"b{i}" for i in range(300)]


def test_split_stays_when_sources_and_order_change(tmp_path: Path) -> None:
    a = source(tmp_path / "a.jsonl", A)
    alone = load_mixture([a], [], 0.2, 7, "text")
    held = set(texts(alone.held_out))
    assert 8 <= len(held) <= 35  # 20 expected, deviation 4
    assert sorted(texts(alone.train) + texts(alone.held_out)) == sorted(A)
    mixed = load_mixture(
        [source(tmp_path / "b.jsonl", B), source(tmp_path / "c.jsonl", A[::-1])], [], 0.2, 7, "text"
    )
    assert set(texts(mixed.held_out)) & set(A) == held
    assert set(texts(load_mixture([a], [], 0.2, 8, "text").held_out)) != held
    # A larger fraction holds out more, and nothing else.
    assert held < set(texts(load_mixture([a], [], 0.5, 7, "text").held_out))


def test_equal_prompts_are_on_one_side_in_every_stage(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"q{i % 40}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(120)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = DataSource(path=str(pairs))
    preferences = load_mixture([one], [], 0.3, 0, "preferences")
    prompts = load_mixture([one], [], 0.3, 0, "prompts")
    held = {row["prompt"][-1]["content"] for row in preferences.held_out.to_list()}
    assert held and held == {row["messages"][-1]["content"] for row in prompts.held_out.to_list()}
    assert not held & {row["prompt"][-1]["content"] for row in preferences.train.to_list()}
    assert len(preferences.held_out) == 3 * len(held)


def test_eval_data_is_held_out_whole(tmp_path: Path) -> None:
    a, b = source(tmp_path / "a.jsonl", A), source(tmp_path / "b.jsonl", B[:5], epochs=9.0)
    mixture = load_mixture([a], [b], 0.5, 0, "text")
    assert sorted(texts(mixture.train)) == sorted(A)
    assert texts(mixture.held_out) == B[:5]
    assert [report.num_read for report in mixture.reports] == [100, 5]


def test_epochs_repeat_and_seed_orders(tmp_path: Path) -> None:
    a = source(tmp_path / "a.jsonl", A[:10], epochs=2.5)
    first = load_mixture([a], [], 0.0, 0, "text")
    drawn = texts(first.train)
    assert len(drawn) == 25 and len(first.held_out) == 0
    # Two whole passes, and five different records a third time.
    assert sorted(drawn.count(text) for text in A[:10]) == [2] * 5 + [3] * 5
    assert drawn == texts(load_mixture([a], [], 0.0, 0, "text").train)
    assert drawn != texts(load_mixture([a], [], 0.0, 1, "text").train)
    assert first.shares[0].num_drawn == 25 and first.shares[0].num_available == 10
    assert "25 of the 25 training records (100.0%), from 10" in first.summary()


def test_weighted_mixture_has_the_shares(tmp_path: Path) -> None:
    a = source(tmp_path / "a.jsonl", A, weight=3.0)
    b = source(tmp_path / "b.jsonl", B, weight=1.0)
    drawn = texts(load_mixture([a, b], [], 0.0, 0, "text").train)
    # All 100 of a are three quarters of 133: 99.75 and 33.25 become 100 and 33.
    assert len(drawn) == 133 and len(set(drawn)) == 133
    assert sum(text.startswith("a") for text in drawn) == 100


COUNTS: list[tuple[list[int], list[dict[str, float]], list[int]]] = [
    ([10, 5], [{"epochs": 1.0}, {"epochs": 0.3}], [10, 2]),  # 1.5 rounds up
    ([10], [{"epochs": 0.3}], [3]),
    ([100, 300], [{"weight": 1.0}, {"weight": 1.0}], [100, 100]),
    ([100, 300], [{"weight": 1.0, "epochs": 3.0}, {"weight": 1.0}], [300, 300]),
    # caps 7, 100, 100; shares .7, .2, .1: total 10.
    ([7, 100, 100], [{"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}], [7, 2, 1]),
    # caps 2, 9, 9; thirds: 6.
    ([2, 9, 9], [{"weight": 1.0}] * 3, [2, 2, 2]),
    # cap floor(2.5) = 2 of share 1/4: total 8, never a third record of the first.
    ([5, 100], [{"weight": 1.0, "epochs": 0.5}, {"weight": 3.0}], [2, 6]),
    # total = floor(2 / (2/7)) = 7.
    ([2, 50], [{"weight": 2.0}, {"weight": 5.0}], [2, 5]),
    # cap 3 of share 3/8: total 8; cap 10 of 5/8: 16.
    ([3, 10], [{"weight": 3.0}, {"weight": 5.0}], [3, 5]),
    # total 4 = floor(3 / (2/3)): 2.67 and 1.33, the larger remainder gets the fourth.
    ([3, 10], [{"weight": 2.0}, {"weight": 1.0}], [3, 1]),
]


@pytest.mark.parametrize(("sizes", "options", "expected"), COUNTS)
def test_source_counts(
    sizes: list[int], options: list[dict[str, float]], expected: list[int]
) -> None:
    sources = [DataSource(path="x.jsonl", **cast(Any, option)) for option in options]
    assert source_counts(sizes, sources) == expected


def test_weights_for_some_sources_are_refused() -> None:
    sources = [DataSource(path="a.jsonl", weight=1.0), DataSource(path="b.jsonl")]
    with pytest.raises(ValueError, match=r"`weight` to all sources or to none.*b\.jsonl"):
        source_counts([1, 1], sources)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data"):
        load_mixture([], [], 0.0, 0, "text")
    tiny = source(tmp_path / "a.jsonl", A[:3], epochs=0.1)
    with pytest.raises(ValueError, match="nothing to train on"):
        load_mixture([tiny], [], 0.0, 0, "text")


# LLaMA's pre-training data (Touvron 2023, arXiv 2302.13971, table 1): proportion and epochs. The
# sizes are such that 2,000 records is the longest mixture: 1,340 / .67, and 36.73 * 2.45 = 90.
LLAMA_TABLE = [
    ("common_crawl", 67.0, 1.0, 1340),
    ("c4", 15.0, 1.0, 300),
    ("github", 4.5, 0.64, 141),
    ("wikipedia", 4.5, 2.45, 37),
    ("books", 4.5, 2.23, 41),
    ("arxiv", 2.5, 1.0, 50),
    ("stack_exchange", 2.0, 1.0, 40),
]


def test_llama_mixture_is_exact_and_can_be_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        source(
            tmp_path / f"{name}.jsonl",
            [f"{name} {i}" for i in range(size)],
            weight=weight,
            epochs=epochs,
        )
        for name, weight, epochs, size in LLAMA_TABLE
    ]
    mixture = load_mixture(sources, [], 0.0, 3, "text")
    drawn = texts(mixture.train)
    assert [share.num_drawn for share in mixture.shares] == [1340, 300, 90, 90, 90, 50, 40]
    by_source = Counter(text.split()[0] for text in drawn)
    assert [100 * by_source[name] / 2000 for name, *_ in LLAMA_TABLE] == [
        67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0,
    ]  # fmt: skip
    assert "github.jsonl: 90 of the 2000 training records (4.5%), from 141" in mixture.summary()
    # Wikipedia: two whole passes and 16 records a third time; GitHub: 90 different ones.
    wikipedia = Counter(text for text in drawn if text.startswith("wikipedia"))
    assert sorted(wikipedia.values()) == [2] * 21 + [3] * 16
    assert len({text for text in drawn if text.startswith("github")}) == 90
    # Well mixed: any 500 in a row hold 335 +- 5 standard deviations of Common Crawl.
    for begin in range(0, 2000, 500):
        part = Counter(text.split()[0] for text in drawn[begin : begin + 500])
        assert abs(part["common_crawl"] - 335) < 5 * 10.5
    # Another process, without the cache, has the same records at every step.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another")
    again = texts(load_mixture(sources, [], 0.0, 3, "text").train)
    for step in (0, 17, 120):
        places = batch_indices(2000, 16, step, seed=3)
        assert [again[i] for i in places] == [drawn[i] for i in places]


def test_training_records_that_give_away_an_evaluation_set_are_left_out(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    questions = tmp_path / "questions.jsonl"
    asked = [long, "Why does the sun rise in the East today?", "Say hi."]
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    trained = [
        "Well, TWO three; four five six seven eight nine ten eleven twelve thirteen fourteen!",
        "two three four five six seven eight nine ten eleven twelve thirteen",  # 12 words
        "Tell me: why does the sun rise in the east today",  # all nine of a shorter prompt
        "say hi",
        "Please say hi.",  # a prompt of two words counts as a whole text alone
    ]
    mixture = load_mixture(
        [source(tmp_path / "a.jsonl", trained)],
        [],
        0.0,
        0,
        "text",
        [DataSource(path=str(questions))],
    )
    assert sorted(texts(mixture.train)) == sorted([trained[1], trained[4]])
    assert mixture.contaminated == {str(questions): 3}
    assert f"left out, with words of {questions}: 3 training records" in mixture.summary()
    with pytest.raises(ValueError, match="leaving out 1 with words of an evaluation set"):
        load_mixture(
            [source(tmp_path / "b.jsonl", ["say hi"])], [], 0.0, 0, "text",
            [DataSource(path=str(questions))],
        )  # fmt: skip


def test_form_of_an_evaluation_set_is_no_contamination(tmp_path: Path) -> None:
    form = "answer the following multiple choice question about history with one letter only please"
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{form} {i} {i + 1} {i + 2}"} for i in range(11)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = build_index([DataSource(path=str(questions))])
    assert index.source_of([form]) == ""
    assert index.source_of([f"{form} 5 6 7"]) == str(questions)


def test_mmlu_questions_are_found_in_training_data(tmp_path: Path, testdata: Path) -> None:
    columns = ["question", "A", "B", "C", "D", "answer"]
    mmlu = {"path": str(testdata / "mmlu/test/*.csv"), "columns": columns}
    evaluation = DataSource.model_validate({**mmlu, "format": {"prompt": "question"}})
    questions = read_source(evaluation, "prompts")[0]["messages"][:]
    planted = [turns[0]["content"] for turns in questions[100:120]]
    rows = [{"prompt": f"Please answer: {text}", "completion": "B"} for text in planted]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean = DataSource(path=str(testdata / "llama_factory/alpaca_en_demo.json"))
    mixture = load_mixture([DataSource(path=str(file)), clean], [], 0.0, 0, "sft", [evaluation])
    found = sum(mixture.contaminated.values())
    # Alpaca's 999 hold none; a planted question under eight words cannot be told from chance.
    short = sum(len(words(text)) < 8 for text in planted)
    assert found == 20 - short and found > 10
    assert [share.num_available for share in mixture.shares] == [short, 999]
