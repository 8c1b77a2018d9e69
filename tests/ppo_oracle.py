"""The update by another way: every response alone, token by token, no microbatches."""

import math
from dataclasses import replace
from typing import Any

import torch
from ppo_runs import TinyRun, make_ptx

from chatllama.model.roles import RoleModel, acting_as, adapter_parameters
from trainers.ppo.rewards import Statistics
from trainers.ppo.rollout import Rollout
from trainers.ppo.train import PpoState, PpoTrainer
from trainers.ppo.update import Targets

# One optimizer step per rollout batch. Adam magnifies how tiny gradients were rounded.
ONE_STEP = {"minibatch_size": 8, "epochs": 1, "adam_eps": 1e-4}


def build(tiny: TinyRun, temperature: float = 1.0, **ppo: Any) -> PpoTrainer:
    ptx = make_ptx() if ppo.get("ptx_coef") else None
    generation = {"temperature": temperature}
    return tiny.trainer(ppo={**ONE_STEP, **ppo}, generation=generation, ptx=ptx)


def state_at(step: int) -> PpoState:
    return PpoState(step, kl_coef=0.05, statistics=Statistics())


def scored_rollout(tiny: TinyRun) -> Rollout:
    """Eight scored responses."""
    trainer = build(tiny)
    return trainer._roll_out(0)[0]


def random_targets(rollout: Rollout) -> Targets:
    generator = torch.Generator().manual_seed(8)
    shape, mask = rollout.values.shape, rollout.response_mask
    advantages, returns = (torch.randn(shape, generator=generator) for _ in range(2))
    return Targets(advantages * mask, returns * mask, mask)


def scored_by_others(rollout: Rollout) -> Rollout:
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
    if trainer.ptx is not None:
        batch = trainer.ptx.step_rows(position, len(rows) // section.microbatch_size)
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
    """One step, policy and critic clipped apart; their joint norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    squares = 0.0
    for group in optimizer.param_groups:
        own = sum(float(p.grad.double().square().sum()) for p in group["params"])
        for parameter in group["params"]:
            assert parameter.grad is not None
            parameter.grad *= min(1.0, trainer.cfg.ppo.max_grad_norm / (math.sqrt(own) + 1e-6))
        group["lr"] = group["peak"] * factor
        squares += own
    optimizer.step()
    return math.sqrt(squares)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        off = float((actual[name] - tensor).abs().max())
        assert off <= 1e-5, (name, off)
