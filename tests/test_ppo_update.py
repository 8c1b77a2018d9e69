"""The update: against an oracle that takes every response alone and knows no microbatches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, make_text, weights

from chatllama.config import PpoSection
from chatllama.roles import RoleModel, acting_as, adapter_parameters
from trainers.ppo import PpoState, PpoTrainer
from trainers.ppo_rewards import Statistics
from trainers.ppo_update import Targets, backward_now, minibatches
from trainers.rollout import Rollout

# One optimizer step per rollout batch. Adam magnifies how tiny gradients were rounded.
ONE_STEP = {"minibatch_size": 8, "epochs": 1, "adam_eps": 1e-4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("update"), tiny_tokenizer_dir)


def build(tiny: TinyRun, temperature: float = 1.0, **ppo: Any) -> PpoTrainer:
    text = make_text() if ppo.get("ptx_coef") else None
    generation = {"temperature": temperature}
    return tiny.trainer(ppo={**ONE_STEP, **ppo}, generation=generation, text=text)


def state_at(step: int) -> PpoState:
    return PpoState(step, kl_coef=0.05, statistics=Statistics())


@pytest.fixture(scope="module")
def rollout(tiny: TinyRun) -> Rollout:
    """Eight scored responses."""
    trainer = build(tiny)
    return trainer._roll_out(0)[0]


@pytest.fixture(scope="module")
def targets(rollout: Rollout) -> Targets:
    generator = torch.Generator().manual_seed(8)
    shape, mask = rollout.values.shape, rollout.response_mask
    advantages, returns = (torch.randn(shape, generator=generator) for _ in range(2))
    return Targets(advantages * mask, returns * mask, mask)


@pytest.fixture(scope="module")
def shifted(rollout: Rollout) -> Rollout:
    """The rollout as if an older policy, value model and reference had scored it."""
    generator = torch.Generator().manual_seed(9)

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * torch.randn(x.shape, generator=generator) * rollout.response_mask

    return replace(
        rollout,
        logprobs=near(rollout.logprobs),
        ref_logprobs=near(rollout.logprobs),
        values=near(rollout.values),
    )


# --- the oracle


def row_of(rollout: Rollout, row: int) -> tuple[list[int], int]:
    """A row's ids without padding, and how many of them are the response."""
    return rollout.tokens[row][rollout.mask[row]].tolist(), int(rollout.lengths[row])


def logprobs_of(model: RoleModel, ids: list[int], temperature: float) -> torch.Tensor:
    """Log-softmax of the policy at every position but the last: (T - 1, V)."""
    with acting_as(model, "policy"):
        logits = model.llama(torch.tensor([ids])).logits[0, :-1]
    return (logits.float() / temperature).log_softmax(-1)


def values_of(model: RoleModel, ids: list[int]) -> torch.Tensor:
    with acting_as(model, "value"):
        hidden = model.llama.model(torch.tensor([ids])).last_hidden_state[0, :-1]
    head: Any = model.heads["value"]
    return hidden @ head.weight[0] + head.bias


def oracle_loss(
    trainer: PpoTrainer, rollout: Rollout, targets: Targets, rows: list[int], position: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one optimizer step and its parts, token by token as the papers have it."""
    section, model = trainer.cfg.ppo, trainer.engine.model
    names = ("policy", "value", "kl", "entropy", "drift", "clips", "value_clips")
    sums, ratio_max = {name: torch.zeros(()) for name in names}, 0.0
    for row in rows:
        ids, length = row_of(rollout, row)
        table = logprobs_of(model, ids, trainer.cfg.generation.temperature)
        values = values_of(model, ids) if "value" in model.heads else None
        for t in range(length):
            if not targets.mask[row, t]:
                continue
            place = len(ids) - 1 - length + t  # the position before token t of the response
            new, old = table[place, ids[place + 1]], rollout.logprobs[row, t]
            advantage, clip = targets.advantages[row, t], section.clip_range
            ratio = (new - old).exp()
            limit = 1 + clip if ratio > 1 else 1 - clip
            bounded = ratio if abs(float(ratio) - 1) < clip else torch.tensor(limit)
            sums["policy"] += -torch.minimum(advantage * ratio, advantage * bounded)
            sums["clips"] += float(advantage * bounded < advantage * ratio)
            sums["kl"] += 0.5 * (new - old).detach() ** 2
            sums["entropy"] += -(table[place].exp() * table[place]).sum().detach()
            k = new - rollout.ref_logprobs[row, t]
            sums["drift"] += 0.5 * k**2 if section.kl_loss_estimator == "k2" else (-k).exp() - 1 + k
            ratio_max = max(ratio_max, ratio.item())
            if values is not None:
                value, before, goal = values[place], rollout.values[row, t], targets.returns[row, t]
                reach = section.value_clip_range
                limit = before + math.copysign(reach, float(value - before))
                near = value if abs(float(value - before)) < reach else limit
                sums["value"] += 0.5 * torch.maximum((value - goal) ** 2, (near - goal) ** 2)
                sums["value_clips"] += float((near - goal) ** 2 > (value - goal) ** 2)
    count = max(int(targets.mask[rows].sum()), 1)
    mean = {name: value / count for name, value in sums.items()}
    loss = mean["policy"] + section.kl_loss_coef * mean["drift"]
    text = torch.zeros(())
    if trainer.text is not None:
        batch = trainer.text.batch(position, len(rows) // section.microbatch_size).rows
        for each in batch:
            table = logprobs_of(model, each["input_ids"], 1.0)
            for t, token in enumerate(each["input_ids"][1:]):
                text = text - table[t, token] * each["mask"][t + 1]
        text = text / sum(sum(each["mask"][1:]) for each in batch)
    loss = loss + section.ptx_coef * text + section.vf_coef * mean["value"]
    numbers = {name: float(value) for name, value in mean.items()}
    return loss, {**numbers, "text": float(text), "ratio_max": ratio_max}


def oracle_optimizer(trainer: PpoTrainer) -> torch.optim.AdamW:
    section, model = trainer.cfg.ppo, trainer.engine.model
    groups = [{"params": adapter_parameters(model, "policy"), "peak": section.learning_rate}]
    if "value" in model.heads:
        value = [*adapter_parameters(model, "value"), *model.heads["value"].parameters()]
        rate = section.value_learning_rate or section.learning_rate
        groups.append({"params": value, "peak": rate})
    return torch.optim.AdamW(
        groups,
        betas=(section.adam_betas[0], section.adam_betas[1]),
        eps=section.adam_eps,
        weight_decay=section.weight_decay,
    )


def oracle_step(
    trainer: PpoTrainer, optimizer: torch.optim.AdamW, loss: torch.Tensor, factor: float
) -> float:
    """One step; the norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trained))
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad *= min(1.0, trainer.cfg.ppo.max_grad_norm / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    optimizer.step()
    return norm


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        off = float((actual[name] - tensor).abs().max())
        assert off <= 1e-5, (name, off)


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
    "trunk": ({"value_model": "policy_trunk"}, LINEAR),
    "no critic": ({"advantage": "rloo", "samples_per_prompt": 2}, LINEAR),
}


@pytest.fixture(scope="module")
def plain(tiny: TinyRun, shifted: Rollout, targets: Targets) -> dict[str, torch.Tensor]:
    """Weights after two steps without options."""
    trainer = build(tiny)
    for step in (0, 1):
        trainer._update(shifted, targets, state_at(step))
    return weights(trainer.engine.model)


@pytest.mark.parametrize("case", CASES)
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
        if case.startswith("kl_loss"):
            expected["kl_loss"] = parts["drift"]
        if case == "ptx":
            expected["ptx_loss"] = parts["text"]
        first = metrics.pop("ppo/first_log_ratio")
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
    trainer._update(rollout, targets, state_at(1))
    after = weights(trainer.engine.model)
    assert any(not torch.equal(after[n], warm[n]) for n in after if ".policy." in n)


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
