"""The update: against an oracle that takes every response alone and knows no microbatches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_oracle import (
    assert_close,
    build,
    oracle_loss,
    oracle_optimizer,
    oracle_step,
    random_targets,
    scored_by_others,
    scored_rollout,
    state_at,
)
from ppo_runs import TinyRun, weights

from chatllama.config.ppo import PpoSection
from trainers.ppo.rollout import Rollout
from trainers.ppo.update import Targets, minibatches


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("update"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def rollout(tiny: TinyRun) -> Rollout:
    return scored_rollout(tiny)


@pytest.fixture(scope="module")
def targets(rollout: Rollout) -> Targets:
    return random_targets(rollout)


@pytest.fixture(scope="module")
def shifted(rollout: Rollout) -> Rollout:
    return scored_by_others(rollout)


# --- one step at a time


LINEAR, CONSTANT = (1.0, 0.5), (1.0, 1.0)  # of the peak learning rate, for two optimizer steps
CASES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "plain": ({}, LINEAR),
    "clip_range": ({"clip_range": 0.05}, LINEAR),
    "value_clip_range": ({"value_clip_range": 0.02}, LINEAR),
    "vf_coef": ({"vf_coef": 2.0}, LINEAR),
    "kl_loss k2": ({"kl_loss_coef": 0.7}, LINEAR),
    "kl_loss k3": ({"kl_loss_coef": 0.7, "kl_loss_estimator": "k3"}, LINEAR),
    "learning_rate": ({"learning_rate": 2e-3}, LINEAR),
    "value_learning_rate": ({"value_learning_rate": 1e-2}, LINEAR),
    "adam_betas": ({"adam_betas": [0.5, 0.8]}, LINEAR),
    "adam_eps": ({"adam_eps": 0.1}, LINEAR),
    "weight_decay": ({"weight_decay": 3.0}, LINEAR),
    "max_grad_norm": ({"max_grad_norm": 1e-3, "adam_eps": 1e-3}, LINEAR),
    "constant": ({"lr_schedule": "constant"}, CONSTANT),
    # 10 % + 90 % * (1 + cos(pi / 2)) / 2
    "cosine": ({"lr_schedule": "cosine"}, (1.0, 0.55)),
    "warmup_steps": ({"warmup_steps": 4}, (0.25, 0.5)),
    "temperature": ({"temperature": 0.6}, LINEAR),
    "ptx": ({"ptx_coef": 0.5, "ptx_data": [{"path": "x"}]}, LINEAR),
    "ptx tempered": ({"ptx_coef": 0.5, "ptx_data": [{"path": "x"}], "temperature": 0.6}, LINEAR),
    "trunk": ({"value_model": "policy_trunk"}, LINEAR),
    "no critic": ({"advantage": "rloo", "samples_per_prompt": 2}, LINEAR),
}


QUICK = ("plain", "clip_range", "kl_loss k3", "ptx", "trunk", "no critic")
"""Those that run in the unit tier."""


@pytest.fixture(scope="module")
def plain(tiny: TinyRun, shifted: Rollout, targets: Targets) -> dict[str, torch.Tensor]:
    """Weights after two steps without options."""
    trainer = build(tiny)
    for step in (0, 1):
        trainer._update(shifted, targets, state_at(step))
    return weights(trainer.engine.model)


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_two_steps_are_what_the_oracle_does(
    tiny: TinyRun, shifted: Rollout, targets: Targets, plain: dict[str, torch.Tensor], case: str
):
    changes, factors = CASES[case]
    trainer, own = build(tiny, **changes), build(tiny, **changes)
    optimizer = oracle_optimizer(own)
    for step, factor in enumerate(factors):
        metrics = trainer._update(shifted, targets, state_at(step))
        loss, parts = oracle_loss(own, shifted, targets, list(range(8)), step)
        norm = oracle_step(own, optimizer, loss, factor)
        expected = {
            "policy_loss": parts["policy"],
            "clip_fraction": parts["clips"],
            "approx_kl": parts["kl"],
            "entropy": parts["entropy"],
            "ratio_max": parts["ratio_max"],
            "grad_norm": norm,
            "lr": own.cfg.ppo.learning_rate * factor,
            "optimizer_steps": 1,
        }
        if case != "no critic":
            expected["value_loss"] = parts["value"]
            expected["value_clip_fraction"] = parts["value_clips"]
            section = own.cfg.ppo
            expected["value_lr"] = (section.value_learning_rate or section.learning_rate) * factor
        if case.startswith("kl_loss"):
            expected["kl_loss"] = parts["drift"]
        if case.startswith("ptx"):
            expected["ptx_loss"] = parts["text"]
        first = metrics.pop("ppo/first_log_ratio")
        assert 0 <= metrics.pop("ppo/first_log_ratio_mean") <= first
        assert metrics == pytest.approx(
            {f"ppo/{name}": value for name, value in expected.items()}, rel=2e-4, abs=1e-6
        )
        assert first > 0.1  # the scores were shifted
    assert_close(weights(trainer.engine.model), weights(own.engine.model))
    if case not in ("plain", "trunk", "no critic"):  # the option has an effect
        moved = weights(trainer.engine.model)
        assert max(float((moved[n] - w).abs().max()) for n, w in plain.items()) > 1e-4


def test_the_oracle_meets_clipping_on_both_sides(tiny: TinyRun, shifted: Rollout, targets: Targets):
    metrics = build(tiny)._update(shifted, targets, state_at(0))
    assert 0.1 < metrics["ppo/clip_fraction"] < 0.9
    assert 0.1 < metrics["ppo/value_clip_fraction"] < 0.9


# --- minibatches and microbatches


@pytest.mark.parametrize("microbatch_size", [4, 8])
def test_microbatches_change_nothing(
    tiny: TinyRun,
    shifted: Rollout,
    targets: Targets,
    plain: dict[str, torch.Tensor],
    microbatch_size: int,
):
    trainer = build(tiny, microbatch_size=microbatch_size)
    for step in (0, 1):
        trainer._update(shifted, targets, state_at(step))
    assert_close(weights(trainer.engine.model), plain)


def test_every_epoch_holds_every_microbatch_once():
    section = PpoSection(rollout_batch_size=24, minibatch_size=8, microbatch_size=2)
    seen = set()
    for seed, step, epoch in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        drawn = minibatches(section, seed, step, epoch)
        assert [len(members) for members in drawn] == [4, 4, 4]
        assert sorted(m for members in drawn for m in members) == list(range(12))
        assert drawn == minibatches(section, seed, step, epoch)
        seen.add(str(drawn))
    assert len(seen) == 4


def test_epochs_of_minibatches_are_steps_one_after_another(
    tiny: TinyRun, shifted: Rollout, targets: Targets
):
    changes = {"minibatch_size": 4, "epochs": 2}
    trainer, own = build(tiny, **changes), build(tiny, **changes)
    metrics = trainer._update(shifted, targets, state_at(1))
    optimizer, position, norms, losses = oracle_optimizer(own), 4, [], []
    for epoch in (0, 1):
        for members in minibatches(own.cfg.ppo, own.cfg.seed, 1, epoch):
            rows = [row for m in members for row in shifted.microbatches(2)[m]]
            loss, parts = oracle_loss(own, shifted, targets, rows, position)
            norms.append(oracle_step(own, optimizer, loss, 1 - position / 8))
            losses.append(parts["policy"] * int(targets.mask[rows].sum()))
            position += 1
    assert_close(weights(trainer.engine.model), weights(own.engine.model))
    assert metrics["ppo/optimizer_steps"] == 4
    assert metrics["ppo/grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-4)
    # an average over tokens, not over minibatches
    tokens = 2 * int(targets.mask.sum())
    assert metrics["ppo/policy_loss"] == pytest.approx(sum(losses) / tokens, rel=1e-3)
