"""Scores: sources and their weights, ensembles, functions, statistics, normalisation, penalties."""

import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppo_runs import sample_of

from chatllama.config.base import load_function
from chatllama.config.ppo import PpoSection
from chatllama.config.schema import Config
from chatllama.runtime.digests import function_file
from trainers.ppo.rewards import Scorer, Statistics, shaped_scores

PROMPTS, RESPONSES = ["a b", "c", "d e f"], ["xx", "", "yyyy"]
SAMPLES = list(map(sample_of, PROMPTS, RESPONSES))
MEMBERS = torch.tensor([[1.0, 3.0, 10.0], [2.0, -2.0, 20.0], [0.5, 0.25, 30.0]])


def scorer(rewards: list[dict[str, Any]], members: list[list[str]], **ppo: Any) -> Scorer:
    cfg = Config.model_validate(
        {"run_dir": "r", "backbone": {"path": "b"}, "ppo": {"rewards": rewards, **ppo}}
    )
    return Scorer(cfg, members)


def total(scorer: Scorer, members: torch.Tensor) -> torch.Tensor:
    return scorer.total(scorer.term_scores(members, SAMPLES))


# --- sources


def test_one_adapter_is_its_own_score():
    one = scorer([{"adapter": "run"}], [["reward"]])
    assert one.roles == ["reward"]
    assert total(one, MEMBERS[:, :1]).tolist() == [1.0, 2.0, 0.5]
    assert one.disagreement(MEMBERS[:, :1]) is None


@pytest.mark.parametrize(("how", "expected"), [("mean", [2, 0, 0.375]), ("min", [1, -2, 0.25])])
def test_an_ensemble_is_combined(how: str, expected: list[float]):
    both = scorer([{"adapter": "run"}], [["reward", "reward_1"]], reward_ensemble=how)
    assert total(both, MEMBERS[:, :2]).tolist() == expected
    # unbiased deviations of (1, 3), (2, -2), (0.5, 0.25)
    deviations = [math.sqrt(2), math.sqrt(8), 0.25 / math.sqrt(2)]
    apart = both.disagreement(MEMBERS[:, :2])
    assert apart is not None and apart.tolist() == pytest.approx(deviations)


def test_sources_are_added_with_their_weights():
    # 2 * min(member 0, member 1) + 0.1 * (10 * words + characters) - 0.5 * member 2
    mixed = scorer(
        [
            {"adapter": "run", "weight": 2.0},
            {"function": "ppo_runs:count_words", "weight": 0.1},
            {"adapter": "elsewhere", "weight": -0.5},
        ],
        [["reward", "reward_1"], ["reward_2"]],
        reward_ensemble="min",
    )
    assert mixed.roles == ["reward", "reward_1", "reward_2"]
    expected = [2 * 1 + 2.2 - 5, 2 * -2 + 1.0 - 10, 2 * 0.25 + 3.4 - 15]
    assert total(mixed, MEMBERS).tolist() == pytest.approx(expected)
    apart = mixed.disagreement(MEMBERS)
    assert apart is not None and apart.tolist()[0] == pytest.approx(math.sqrt(2))


def test_functions_alone_need_no_adapter():
    alone = scorer([{"function": "ppo_runs:count_words"}], [])
    assert alone.roles == []
    assert total(alone, torch.zeros(3, 0)).tolist() == [22.0, 10.0, 34.0]


@pytest.mark.parametrize(
    ("name", "shares"), [("count_words", [[0, 2], [1]]), ("batch_lengths", [[0, 1, 2], []])]
)
def test_each_rank_asks_functions_about_its_share(
    monkeypatch: pytest.MonkeyPatch, name: str, shares: list[list[int]]
):
    alone = scorer([{"function": f"ppo_runs:{name}"}], []).terms[0].judge
    assert alone is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, share in enumerate(shares):
        monkeypatch.setenv("RANK", str(rank))
        assert list(alone.rows(3)) == share


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1"])
def test_a_function_without_a_finite_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: object
):
    import ppo_runs

    monkeypatch.setattr(ppo_runs, "count_words", lambda prompt, response: value)
    broken = scorer([{"function": "ppo_runs:count_words"}], [])
    with pytest.raises(ValueError) as caught:
        total(broken, torch.zeros(3, 0))
    message = str(caught.value)
    assert repr(value) in message and "'a b'" in message and "'xx'" in message


@pytest.mark.parametrize("value", [torch.tensor(1.5), np.float32(1.5), True])
def test_numbers_of_other_libraries_are_numbers(monkeypatch: pytest.MonkeyPatch, value: Any):
    import ppo_runs

    monkeypatch.setattr(ppo_runs, "count_words", lambda prompt, response: value)
    found = total(scorer([{"function": "ppo_runs:count_words"}], []), torch.zeros(3, 0))
    assert found.tolist() == [float(value)] * 3 and found.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["ppo_runs:nothing", "no_such_module:f", "ppo_runs", ":f", "ppo_runs:VOCABULARY"]
)
def test_a_function_that_cannot_be_imported_is_refused_by_its_key(name: str):
    with pytest.raises(ValueError, match=r"ppo\.rewards\.1\.function: ") as caught:
        scorer([{"adapter": "run"}, {"function": name}], [["reward"]])
    assert repr(name) in str(caught.value)


def test_functions_of_the_working_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in os.sys.path if p])  # type: ignore[attr-defined]
    (tmp_path / "my_reward_of_a_test.py").write_text("def three(p, r):\n    return 3\n")
    assert load_function("my_reward_of_a_test:three", "k")("", "") == 3
    assert load_function("my_reward_of_a_test.py:three", "k")("", "") == 3
    for name in ("my_reward_of_a_test:three", "my_reward_of_a_test.py:three"):
        assert function_file(name) == tmp_path / "my_reward_of_a_test.py"


def test_an_error_inside_the_users_module_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_broken_module_of_a_test.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(ValueError, match="no_such_thing_at_all"):
        load_function("my_broken_module_of_a_test:f", "k")


# --- statistics


def test_statistics_by_hand():
    none = Statistics()
    assert (none.mean, none.deviation) == (0.0, 1.0)
    four = none.merged(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # squares: 2.25 + 0.25 + 0.25 + 2.25 = 5; deviation sqrt(5 / 3)
    assert (four.count, four.mean, four.squares) == (4, 2.5, 5.0)
    assert four.deviation == pytest.approx(math.sqrt(5 / 3))
    six = four.merged(torch.tensor([10.0, 10.0]))
    # mean 30 / 6 = 5; squares 16 + 9 + 4 + 1 + 25 + 25 = 80
    assert (six.count, six.mean, six.squares) == (6, 5.0, pytest.approx(80.0))
    assert six.deviation == pytest.approx(4.0)
    assert Statistics().merged(torch.tensor([7.0])).deviation == 1.0
    assert Statistics().merged(torch.full((3,), 7.0)).deviation == 1.0


@pytest.mark.parametrize("size", [0.3, -7.7, 4096.1])
def test_scores_that_differ_by_rounding_do_not_vary(size: float):
    scores = torch.full((5,), size)
    scores[2] = torch.nextafter(scores[2], torch.tensor(0.0))
    same = Statistics().merged(scores)
    assert same.squares > 0 and not same.varies and same.deviation == 1.0
    scores[2] *= 1.0001
    assert Statistics().merged(scores).varies


def test_statistics_far_from_zero_keep_their_digits():
    numbers = 1e6 + torch.arange(100, dtype=torch.float32)
    merged = Statistics()
    for part in numbers.split(7):
        merged = merged.merged(part)
    assert merged.mean == pytest.approx(1e6 + 49.5, rel=1e-12)
    # variance of 0..99 with n - 1: 100 * 101 / 12
    assert merged.deviation == pytest.approx(math.sqrt(100 * 101 / 12), rel=1e-9)
    for size in (1e5, -3e5, 2.0**20):  # the mean of a part is not exact in float32
        part = [size, size + 1, size + 3]
        found = Statistics().merged(torch.tensor(part))
        assert found.mean == pytest.approx(statistics.fmean(part), rel=1e-12)
        assert found.deviation == pytest.approx(statistics.stdev(part), rel=1e-9)


# --- what PPO sees

SCORES = torch.tensor([3.0, -5.0, 1.0])
FINISHED = torch.tensor([True, True, False])
LENGTHS = torch.tensor([2, 4, 10])
STATISTICS = Statistics(count=5, mean=1.0, squares=16.0)  # deviation sqrt(16 / 4) = 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # (3 - 1) / 2, (-5 - 1) / 2, (1 - 1) / 2 less the penalty of 1
        ({}, [1, -3, -1]),
        ({"score_normalization": "running"}, [1, -3, -1]),
        ({"score_normalization": "none"}, [3, -5, 0]),
        ({"missing_eos_penalty": 0.25}, [1, -3, -0.25]),
        ({"missing_eos": "filter"}, [1, -3, 0]),
        ({"length_penalty": 0.1}, [0.8, -3.4, -2]),
        # clipped after normalising and before the penalties: neither 3 nor -5 is clipped to 2
        ({"score_clip": 2.0}, [1, -2, -1]),
        ({"score_clip": 0.5, "length_penalty": 0.5}, [-0.5, -2.5, -6]),
        ({"score_clip": 2.0, "score_normalization": "none"}, [2, -2, 0]),
    ],
)
def test_shaped_scores_by_hand(changes: dict[str, Any], expected: list[float]):
    section = PpoSection.model_validate(changes)
    found = shaped_scores(section, SCORES, FINISHED, LENGTHS, STATISTICS)
    assert found.tolist() == pytest.approx(expected)
