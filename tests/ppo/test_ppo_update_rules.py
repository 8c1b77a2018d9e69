"""The update: which rows and weights count, and when it stops."""

import math
from dataclasses import replace
from pathlib import Path

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

from chatllama.model.roles import adapter_parameters
from trainers.ppo.rollout import Rollout
from trainers.ppo.update import Targets, backward_now, minibatches


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


# --- rows that do not count


def test_filtered_rows_get_no_gradient(tiny: TinyRun, shifted: Rollout, targets: Targets):
    mask = targets.mask.clone()
    mask[[1, 4, 6]] = False
    kept, own = build(tiny), build(tiny)
    garbage = replace(targets, mask=mask)
    for name in ("advantages", "returns"):
        tensor = garbage.__dict__[name].clone()
        tensor[[1, 4, 6]] = torch.nan
        garbage = replace(garbage, **{name: tensor})
    metrics = kept._update(shifted, garbage, state_at(0))
    loss, parts = oracle_loss(own, shifted, replace(targets, mask=mask), [0, 2, 3, 5, 7], 0)
    oracle_step(own, oracle_optimizer(own), loss, 1.0)
    assert_close(weights(kept.engine.model), weights(own.engine.model))
    assert metrics["ppo/policy_loss"] == pytest.approx(parts["policy"], rel=1e-4)


def test_a_minibatch_of_which_nothing_counts_changes_nothing(
    tiny: TinyRun, shifted: Rollout, targets: Targets
):
    trainer = build(tiny)
    before = weights(trainer.engine.model)
    nothing = replace(targets, mask=torch.zeros_like(targets.mask))
    metrics = trainer._update(shifted, nothing, state_at(0))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["ppo/grad_norm"] == 0 and metrics["ppo/policy_loss"] == 0
    for name, tensor in weights(trainer.engine.model).items():
        assert torch.equal(tensor, before[name]), name


# --- early stop, warm-up, what moves


def test_an_update_stops_once_the_kl_is_above_its_target(
    tiny: TinyRun, rollout: Rollout, targets: Targets
):
    sizes = {"minibatch_size": 4, "epochs": 3, "learning_rate": 1e-2}
    stopping = build(tiny, target_kl=1e-7, **sizes)
    metrics = stopping._update(rollout, targets, state_at(0))
    # in the first minibatch the ratio is still 1: approx_kl 0; after the second it is over
    assert metrics["ppo/optimizer_steps"] == 2
    assert metrics["ppo/update_share"] == pytest.approx(2 / 6)
    own = build(tiny, **sizes)
    optimizer = oracle_optimizer(own)
    for position, members in enumerate(minibatches(own.cfg.ppo, own.cfg.seed, 0, 0)):
        rows = [row for m in members for row in rollout.microbatches(2)[m]]
        loss, _ = oracle_loss(own, rollout, targets, rows, position)
        oracle_step(own, optimizer, loss, 1 - position / 12)
    assert_close(weights(stopping.engine.model), weights(own.engine.model))
    patient = build(tiny, target_kl=1e3, **sizes)._update(rollout, targets, state_at(0))
    assert patient["ppo/optimizer_steps"] == 6 and patient["ppo/update_share"] == 1
    # and the next update is not stopped by what the last one did
    assert stopping._update(rollout, targets, state_at(1))["ppo/optimizer_steps"] >= 1


def test_the_target_is_compared_with_one_minibatch(
    tiny: TinyRun, rollout: Rollout, targets: Targets
):
    sizes = {"minibatch_size": 4, "epochs": 1, "learning_rate": 1e-2, "lr_schedule": "constant"}
    whole = build(tiny, **sizes)._update(rollout, targets, state_at(0))
    # all of the KL is the second minibatch's; the metric averages over the tokens of both
    second = minibatches(build(tiny, **sizes).cfg.ppo, 0, 0, 0)[1]
    rows = [row for m in second for row in rollout.microbatches(2)[m]]
    share = int(targets.mask[rows].sum()) / int(targets.mask.sum())
    kl = whole["ppo/approx_kl"] / share
    sizes["epochs"] = 2
    for target, steps in ((kl * 0.99, 2), (kl * 1.01, 3)):
        trainer = build(tiny, target_kl=target, **sizes)
        done = trainer._update(rollout, targets, state_at(0))["ppo/optimizer_steps"]
        assert (done == 2) == (steps == 2)


@pytest.mark.parametrize("value_model", ["adapter", "policy_trunk"])
def test_while_the_critic_warms_up_the_policy_rests(
    tiny: TinyRun, rollout: Rollout, targets: Targets, value_model: str
):
    options = {"ptx_coef": 0.5, "ptx_data": [{"path": "x"}], "kl_loss_coef": 1.0}
    trainer = build(
        tiny, critic_warmup_steps=1, value_model=value_model, weight_decay=0.1, **options
    )
    before = weights(trainer.engine.model)
    metrics = trainer._update(rollout, targets, state_at(0))
    warm = weights(trainer.engine.model)
    moved = {name for name, tensor in warm.items() if not torch.equal(tensor, before[name])}
    assert not {name for name in moved if ".policy." in name}
    assert "heads.value.weight" in moved and "heads.value.bias" in moved
    assert any(".lora_B.value." in name for name in moved) == (value_model == "adapter")
    assert metrics["ppo/policy_loss"] != 0  # measured all the same
    assert metrics["ppo/lr"] == 0 and metrics["ppo/value_lr"] > 0
    trainer._update(rollout, targets, state_at(1))
    after = weights(trainer.engine.model)
    assert any(not torch.equal(after[n], warm[n]) for n in after if ".policy." in n)


@pytest.mark.parametrize("warmup", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_the_policys_clocks_begin_after_the_critics_warm_up(
    tiny: TinyRun, shifted: Rollout, targets: Targets, warmup: int
):
    """Learning-rate warm-up and decay, and AdamW's bias correction, which is largest at first."""
    options = {"warmup_steps": 2, "lr_schedule": "cosine", "weight_decay": 0.1}
    options["microbatch_size"] = 8  # whose order would change with the step
    waiting = build(tiny, critic_warmup_steps=warmup, steps=warmup + 2, **options)
    at_once = build(tiny, steps=2, **options)
    for step in range(warmup + 2):
        metrics = waiting._update(shifted, targets, state_at(step))
        if step >= warmup:
            own = at_once._update(shifted, targets, state_at(step - warmup))
            assert metrics["ppo/lr"] == own["ppo/lr"] > 0
    found, expected = (
        [p for n, p in weights(trainer.engine.model).items() if ".policy." in n]
        for trainer in (waiting, at_once)
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "vf_coef", [1e4, *(pytest.param(c, marks=pytest.mark.slow) for c in (0.0, 1.0))]
)
def test_the_critics_gradient_does_not_shrink_the_policys_step(
    tiny: TinyRun, shifted: Rollout, targets: Targets, vf_coef: float
):
    trainers = [build(tiny, vf_coef=coef, max_grad_norm=1e-2) for coef in (vf_coef, 0.1)]
    norms = [t._update(shifted, targets, state_at(0))["ppo/grad_norm"] for t in trainers]
    assert norms[0] != norms[1]
    mine, theirs = (weights(trainer.engine.model) for trainer in trainers)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if ".policy." in name)


def test_the_critic_warms_up_on_its_own_loss_alone(
    tiny: TinyRun, shifted: Rollout, targets: Targets
):
    trainer, own = build(tiny, critic_warmup_steps=1), build(tiny)
    metrics = trainer._update(shifted, targets, state_at(0))
    for parameter in adapter_parameters(own.engine.model, "policy"):
        parameter.requires_grad_(False)
    optimizer = oracle_optimizer(own)
    optimizer.param_groups.pop(0)
    loss, parts = oracle_loss(own, shifted, targets, list(range(8)), 0)
    norm = oracle_step(own, optimizer, loss, 1.0)
    assert metrics["ppo/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["ppo/value_loss"] == pytest.approx(parts["value"], rel=1e-4)
    assert_close(weights(trainer.engine.model), weights(own.engine.model))


def test_a_step_moves_all_that_trains_and_nothing_else(tiny: TinyRun):
    trainer = build(tiny, minibatch_size=4, epochs=2)
    before = weights(trainer.engine.model)
    state = trainer.start()
    normalised = weights(trainer.engine.model)
    for name, tensor in normalised.items():
        assert torch.equal(tensor, before[name]) != name.startswith("heads.value."), name
    trainer.advance(trainer.advance(state)[0])
    after = weights(trainer.engine.model)
    roles = {name: p.requires_grad for name, p in trainer.engine.model.named_parameters()}
    assert {n for n, t in after.items() if not torch.equal(t, normalised[n])} == {
        name for name, trains in roles.items() if trains
    }
    trained = {name for name, trains in roles.items() if trains}
    assert all(".policy." in n or ".value." in n or n.startswith("heads.value") for n in trained)
    assert len(trained) > 20


def test_before_any_step_the_ratio_is_exactly_one(
    tiny: TinyRun, rollout: Rollout, targets: Targets
):
    for microbatch_size in (1, 2, 4, 8):
        trainer = build(tiny, microbatch_size=microbatch_size)
        fresh, _ = trainer._roll_out(0)
        assert torch.equal(fresh.logprobs, fresh.ref_logprobs)
        mask = fresh.response_mask
        goals = Targets(torch.ones_like(fresh.values), torch.zeros_like(fresh.values), mask)
        metrics = trainer._update(fresh, goals, state_at(0))
        assert metrics["ppo/first_log_ratio"] == 0 and metrics["ppo/ratio_max"] == 1


def test_a_graph_that_is_walked_at_once_gives_the_same_gradients_and_is_gone():
    weight, other = (torch.randn(3, requires_grad=True) for _ in range(2))
    loss = (weight * other).square().sum()
    settled = backward_now(loss, [weight, other])
    assert torch.equal(settled, loss) and settled.requires_grad
    (0.25 * settled).backward()
    plain = [w.detach().clone().requires_grad_() for w in (weight, other)]
    (0.25 * (plain[0] * plain[1]).square().sum()).backward()
    for mine, theirs in zip((weight, other), plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
