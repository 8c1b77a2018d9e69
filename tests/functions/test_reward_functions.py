"""Reward functions as people write them: forms, columns, errors, limits, metrics."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import sample_of

from chatllama.config.ppo import PpoSection, RewardSource
from chatllama.config.schema import Config
from data.mixture import load_mixture
from data.reading.source import DataSource
from trainers.functions.functions import RewardFunction
from trainers.functions.sample import Sample
from trainers.ppo.rewards import Scorer
from trainers.stages.lineage import changed_keys

SAMPLES = [sample_of("a b", "xx", answer=1), sample_of("c", "yyyy", answer=2)]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def made(name: str, **settings: Any) -> RewardFunction:
    source = RewardSource(function=f"{Path(__file__).parent}/rewards_of_tests:{name}", **settings)
    return RewardFunction(source, "ppo.rewards.0.function")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("with_column", [3, 6]),
        ("with_all", [1, 2]),
        ("batch", [3, 6]),
        ("batch_of_names", [3, 6]),
        ("later", [2, 4]),
        ("batch_later", [2, 4]),
    ],
)
def test_every_form_is_called_as_it_is_written(name: str, expected: list[float]) -> None:
    function = made(name)
    assert function.is_batched == name.startswith("batch")
    assert function.values(SAMPLES) == expected
    assert function.values([]) == []


def test_a_column_that_a_record_lacks_is_named() -> None:
    lacking = [SAMPLES[0], sample_of("c", "y", solution=3)]
    assert made("batch").values(lacking) == [3, 1]  # takes what there is
    for name in ("with_column", "batch_of_names"):
        with pytest.raises(ValueError, match=r"needs 'answer', which a\.jsonl:7 .*: solution"):
            made(name).values(lacking)


@pytest.mark.parametrize("name", ["careless", "batch_careless"])
def test_an_error_names_the_record_and_the_line(name: str) -> None:
    samples = [sample_of("why", "bad"), sample_of("q", "good")]
    with pytest.raises(ValueError) as caught:
        made(name).values(samples)
    message = str(caught.value)
    assert f":{name} failed for a.jsonl:7 (prompt 'why', response 'bad')" in message
    assert "KeyError: 'no such thing'" in message and "rewards_of_tests.py:" in message
    assert ("and 1 more" in message) == (name == "batch_careless")


def test_a_batch_needs_a_number_for_each_answer() -> None:
    with pytest.raises(ValueError, match=r"gave \[1\.0\] for 2 answers: it must give a list"):
        made("too_few").values(SAMPLES)


def test_asynchronous_calls_run_together_within_their_limit() -> None:
    started = time.monotonic()
    many = [sample_of("q", "abc") for _ in range(50)]
    assert made("later").values(many) == [3.0] * 50
    assert time.monotonic() - started < 0.9  # one after another: 50 times 0.02 s
    slow = [sample_of("q", "slow"), sample_of("q", "ab")]
    assert made("later", timeout=0.1, timeout_score=-7.0).values(slow) == [-7.0, 2.0]
    with pytest.raises(ValueError, match=r"a\.jsonl:7 .*'slow'.*: it took more than 0\.1 s"):
        made("later", timeout=0.1).values(slow)


@pytest.mark.slow
def test_processes_have_limits_and_are_replaced() -> None:
    words = ["ab", "slow", "abc", "a"]
    samples = [sample_of("q", word) for word in words]
    for name in ("careless", "batch_careless"):
        function = made(name, processes=2, timeout=0.5, timeout_score=-1.0)
        assert function.values(samples) == [2.0, -1.0, 3.0, 1.0]
        assert function.values(samples[::-1]) == [1.0, 3.0, -1.0, 2.0]  # once more
        assert function.pool is not None
        function.pool.close()
    function = made("careless", processes=1, timeout=20.0)
    with pytest.raises(ValueError, match=r"failed for a\.jsonl:7 .*'dead'.* ended \(code 3\)"):
        function.values([sample_of("q", "dead"), sample_of("q", "fine")])
    with pytest.raises(ValueError, match=r"'bad'.*KeyError.*rewards_of_tests\.py"):
        function.values([sample_of("q", "bad")])
    assert function.values([sample_of("q", "fine")]) == [4.0]
    later = made("later", processes=1)
    assert later.values([sample_of("q", "abc")]) == [3.0]
    for each in (function, later):
        assert each.pool is not None
        each.pool.close()


def test_a_limit_that_nothing_can_enforce_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards\.0\.timeout: .* set processes, or make it"):
        made("careless", timeout=1.0)


@pytest.mark.parametrize(
    ("terms", "problem"),
    [
        ([{"adapter": "run", "function": "a:b"}], "exactly one of"),
        ([{}], "exactly one of"),
        ([{"adapter": "run", "processes": 2}], "processes and timeout_score are for a function"),
        ([{"model": "m", "timeout": 2.0}], "timeout is for a function or urls"),
        ([{"function": "a:b", "timeout_score": 0.0}], "give timeout"),
        ([{"function": "a:f"}, {"function": "b:f"}], "two terms are called f: give each a `name`"),
    ],
)
def test_terms_that_make_no_sense_are_refused(terms: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PpoSection.model_validate({"rewards": terms})


def test_each_term_is_logged_with_its_share() -> None:
    terms = [
        {"function": "ppo_runs:count_words", "weight": 0.5},
        {"function": "ppo_runs:letter_sum", "weight": -3.0, "name": "letters"},
    ]
    cfg = Config.model_validate(
        {"run_dir": "r", "backbone": {"path": "b"}, "ppo": {"rewards": terms}}
    )
    scorer = Scorer(cfg, [])
    found = scorer.metrics(torch.tensor([[10.0, 1.0], [14.0, 3.0]]))
    assert found.pop("ppo/reward_seconds") == 0
    # deviations 2 * 0.5 and 1 * 3
    assert found == pytest.approx(
        {
            "ppo/term_mean/count_words": 12.0,
            "ppo/term_share/count_words": 0.25,
            "ppo/term_mean/letters": 2.0,
            "ppo/term_share/letters": 0.75,
        }
    )
    scorer.term_scores(torch.zeros(2, 0), SAMPLES)
    assert scorer.metrics(torch.zeros(2, 2))["ppo/reward_seconds"] > 0


def test_columns_of_the_data_reach_the_function(tmp_path: Path) -> None:
    lines = '{"question": "1+1?", "answer": "2", "tests": [3, {"a": null}], "price": 1.5}\n'
    (tmp_path / "q.jsonl").write_text(lines * 2)
    (tmp_path / "q.csv").write_text("prompt,level\nhello,7\nhi,8\n")
    for file, prompt, columns in (
        ("q.jsonl", "1+1?", {"answer": "2", "tests": [3, {"a": None}], "price": 1.5}),
        ("q.csv", "hello", {"level": "7"}),
    ):
        source = DataSource(path=str(tmp_path / file))
        row = load_mixture([source], [], 0.0, 0, "prompts").train.sort("where")[0]
        sample = Sample.of({**row, "text": row["messages"][-1]["content"]}, "x")
        assert sample.prompt == prompt and columns.items() <= sample.columns.items()
        assert sample.where.startswith(f"{tmp_path / file}:")


def test_records_of_before_these_keys_are_still_the_same() -> None:
    now = {"config": {"ppo.rewards": [RewardSource(adapter="run").model_dump()]}}
    before = {"config": {"ppo.rewards": [{"adapter": "run", "function": None, "weight": 1.0}]}}
    assert changed_keys(before, now) == {}
    other = {"config": {"ppo.rewards": [{"adapter": "run", "function": None, "weight": 2.0}]}}
    assert list(changed_keys(other, now)) == ["ppo.rewards"]
