"""Metrics of a rollout batch by hand, on answers that are made up."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainers.ppo.metrics import clustered_error, rollout_metrics
from trainers.ppo.rollout import Rollout, arrange

MINE = torch.tensor([[-1.0, -3.0], [-2.0, -9.0]])


def made_up(logprobs: Any, ref_logprobs: Any) -> Rollout:
    """Two answers of two tokens and of one."""
    arranged = arrange([[1, 5], [1]], [[7, 2], [2]], [2], pad_id=0)
    zeros = torch.zeros(2, 2)
    return replace(arranged, logprobs=logprobs, ref_logprobs=ref_logprobs, entropy=zeros)


@pytest.mark.parametrize(
    ("gaps", "largest"),
    [
        ([[-0.5, 0.1], [0.2, 9.0]], 0.5),
        ([[-0.5, -0.7], [-0.2, -9.0]], 0.7),
        ([[0.5, 0.1], [0.6, math.nan]], 0.6),
    ],
)
def test_the_largest_difference_has_no_sign(gaps: list[list[float]], largest: float):
    rollout = made_up(MINE, MINE - torch.tensor(gaps))
    metrics = rollout_metrics(rollout, torch.tensor([1.0, 2.0]), torch.zeros(2, 2))
    assert metrics["ppo/kl_abs_max"] == pytest.approx(largest)
    per_answer = [sum(gaps[0]), gaps[1][0]]
    assert metrics["ppo/kl_sequence"] == pytest.approx(statistics.fmean(per_answer))
    assert metrics["ppo/kl_token"] == pytest.approx(sum(per_answer) / 3)
    error = statistics.stdev(per_answer) / math.sqrt(2)
    assert metrics["ppo/kl_sequence_se"] == pytest.approx(error, rel=1e-5)


def test_an_error_over_clusters_by_hand():
    # Clusters (1, 3), (5, 7, 2), (0): mean 3; sums off it -2, 5, -3; C / (C - 1) = 3 / 2.
    values, clusters = (
        torch.tensor([1.0, 5.0, 3.0, 7.0, 0.0, 2.0]),
        torch.tensor([0, 1, 0, 1, 2, 1]),
    )
    expected = math.sqrt(1.5 * (4 + 25 + 9)) / 6
    assert clustered_error(values, clusters) == pytest.approx(expected)
    alone = clustered_error(values, torch.arange(6))
    assert alone == pytest.approx(statistics.stdev(values.tolist()) / math.sqrt(6))
    assert clustered_error(values, torch.zeros(6).long()) is None
