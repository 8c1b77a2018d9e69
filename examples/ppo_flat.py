"""PPO of a language model in one file, to be read from top to bottom.

    python examples/ppo_flat.py runs/quickstart --out my-policy

Reads the config of a run and the adapters that its SFT and reward stages wrote; writes the adapter
of a better policy. Policy, reference, reward and value model are four adapters on one frozen LLaMA.
One process on one device; `train_ppo.py` adds ranks, resuming, monitoring, evaluation and many
options, and computes the same numbers. Shapes: B responses of a step, P prompt, R response,
T = P + R; a mask is True where a token counts.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from chatllama.config.batch_sizes import microbatches_per_step, ppo_lr_factors, ppo_optimizer_steps
from chatllama.config.loader import load_config
from chatllama.config.ppo import PpoSection
from chatllama.config.schema import Config
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model.adapters import load_adapter, save_adapter
from chatllama.model.backbone import load_backbone
from chatllama.model.roles import (
    Adapter,
    Role,
    RoleModel,
    ScalarHead,
    acting_as,
    adapter_parameters,
    adapter_state,
    autocast,
)
from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences
from chatllama.runs.folder import RunFolder, backbone_path, base_path
from chatllama.runtime.distributed import device, to_device
from chatllama.text.chat_format import check_contract
from chatllama.text.padding import pad_left, pad_right
from chatllama.text.tokenizer import load_tokenizer
from data.batches import batch_indices
from trainers.engine.microbatches import balanced_groups
from trainers.ppo.data import StopTokens, load_prompts, stop_tokens
from trainers.ppo.ppo_math import gae, masked, policy_loss, shape_rewards, value_loss, whiten

OPTIONS = (
    "steps data max_prompt_length decontaminate rollout_batch_size minibatch_size microbatch_size "
    "epochs learning_rate lr_schedule warmup_steps critic_warmup_steps weight_decay adam_eps "
    "adam_betas max_grad_norm kl_coef gamma lam clip_range value_clip_range vf_coef "
    "missing_eos_penalty score_normalization_samples eval_data eval_fraction eval_every save_every "
    "save_total_limit health"
)
"""Keys of `ppo` that this file honours, or that change no weights."""
PER_TOKEN = ("logprobs", "ref_logprobs", "values")


@dataclass
class Batch:
    """The sampled responses of one step; tokens and masks on the CPU, the rest on the device."""

    tokens: Tensor  # (B, T) int64: left-padded prompts, then right-padded responses
    mask: Tensor  # (B, T) bool: real tokens
    response_mask: Tensor  # (B, R) bool: True up to and including the stop token
    finished: Tensor  # (B,) bool: the response ends with a stop token
    microbatches: list[list[int]]  # rows of one forward pass, with about equally many tokens
    logprobs: Tensor  # (B, R) float32: of the policy that sampled
    ref_logprobs: Tensor  # (B, R) float32: of the reference
    values: Tensor  # (B, R) float32: of the state before each token
    scores: Tensor  # (B,) float32: of the reward model


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a policy for the run that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with SFT and reward model")
    parser.add_argument("--out", type=Path, default=Path("policy"), help="adapter to write")
    arguments = parser.parse_args(argv)
    run = RunFolder(arguments.run)
    cfg = load_config(run.existing_config())
    check_options(cfg)
    tokenizer = load_tokenizer(backbone_path(cfg.backbone, run))
    sft, reward = load_adapter(run.sft_adapter), load_adapter(run.reward_adapter)
    for saved, folder in ((sft, run.sft_adapter), (reward, run.reward_adapter)):
        check_contract(saved.info.get("contract"), tokenizer, cfg.chat, str(folder))

    # The reference is SFT's adapter, not the bare base; the critic starts from the reward model.
    torch.manual_seed(cfg.seed)
    model = RoleModel(
        load_backbone(cfg.backbone, base_path(cfg, run)),
        {
            "reference": Adapter(sft.lora, sft.state),
            "policy": Adapter(sft.lora, sft.state, trainable=True),
            "reward": Adapter(reward.lora, reward.state),
            "value": Adapter(reward.lora, reward.state, trainable=True),
        },
        heads=("reward", "value"),
    ).to(device())
    for role in ("reward", "value"):
        model.heads[role].load_state_dict(reward.head, strict=role == "reward")

    prompts, stop = load_prompts(cfg, tokenizer).train, stop_tokens(cfg, tokenizer)
    for step, (_, metrics) in enumerate(train(cfg, model, prompts.to_list(), stop), start=1):
        print(f"step {step}: " + ", ".join(f"{n} {value:.4g}" for n, value in metrics.items()))
    state, info = adapter_state(model, "policy"), {**sft.info, "stage": "ppo"}
    save_adapter(arguments.out, state, sft.lora, info)


def check_options(cfg: Config) -> None:
    """Raises ValueError if the run's config sets an option that is not in this file."""
    default, honoured = PpoSection().model_dump(), OPTIONS.split()
    changed = [name for name, value in cfg.ppo.model_dump().items() if value != default[name]]
    others = [f"ppo.{name}" for name in changed if name not in honoured]
    others += ["generation.servers"] if cfg.generation.servers is not None else []
    others += ["reward.ensemble"] if cfg.reward.ensemble > 1 else []
    if others:
        raise ValueError(f"not in ppo_flat.py: {', '.join(others)}. Use train_ppo.py")


def train(
    cfg: Config, model: RoleModel, prompts: list[dict], stop: StopTokens
) -> Iterator[tuple[Batch, dict[str, float]]]:
    """Trains policy and value in place; yields the responses and metrics of every step."""
    section = cfg.ppo
    policy, head = adapter_parameters(model, "policy"), cast(ScalarHead, model.heads["value"])
    value = [*adapter_parameters(model, "value"), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"name": "policy", "params": policy}, {"name": "value", "params": value}],
        betas=(section.adam_betas[0], section.adam_betas[1]),
        eps=section.adam_eps,
        weight_decay=section.weight_decay,
    )

    def sample(role: Role, count: int, step: int, number: int) -> Batch:
        chosen = batch_indices(len(prompts), count, step, cfg.seed)
        return roll_out(cfg, model, role, [prompts[i]["input_ids"] for i in chosen], stop, number)

    # Scores are normalised by those of the reference's answers. The value head, a copy of the
    # reward head, must predict normalised scores from the first step on.
    scores = sample("reference", section.score_normalization_samples, 0, 0).scores.double()
    mean, deviation = float(scores.mean()), float(scores.std())
    if deviation < section.health.min_score_std * max(1.0, abs(mean)):
        raise ValueError(f"all answers score about {mean:g}: the reward model says nothing")
    with torch.no_grad():
        head.weight.mul_(1 / deviation)
        head.bias.sub_(mean).mul_(1 / deviation)

    for step in range(section.steps):
        batch = sample("policy", section.rollout_batch_size, step, step + 1)
        mask, kl = to_device(batch.response_mask), batch.logprobs - batch.ref_logprobs
        # Rewards: the score at the last token, less the KL penalty at every token.
        unfinished = (~to_device(batch.finished)).float()
        scores = (batch.scores - mean) / deviation - section.missing_eos_penalty * unfinished
        rewards = shape_rewards(scores, kl, mask, section.kl_coef)
        advantages, returns = gae(rewards, batch.values, mask, section.gamma, section.lam)
        losses = update(cfg, model, optimizer, batch, whiten(advantages, mask), returns, step)
        metrics = {"score_mean": scores.mean(), "kl_sequence": masked(kl, mask).sum(1).mean()}
        yield batch, {name: float(value) for name, value in (metrics | losses).items()}


def roll_out(
    cfg: Config, model: RoleModel, role: Role, prompts: list[list[int]], stop: StopTokens, seed: int
) -> Batch:
    """Answers of `role` to the prompts, scored by all four roles.

    Microbatches and functions are those of the update, so that its first probability ratio is 1.
    """
    generation = cfg.generation
    generator = torch.Generator().manual_seed(hash((cfg.seed, seed)) % 2**63)
    uniforms = torch.rand(len(prompts), generation.max_new_tokens, generator=generator)
    settings, batch_size = Sampling.of(generation), generation.batch_size
    model.eval()
    with acting_as(model, role), autocast(model):
        responses = generate(model.llama, prompts, settings, stop.stop_ids, uniforms, batch_size)
    prompt_ids, prompt_mask = pad_left(prompts, stop.pad_id)
    response_ids, response_mask = pad_right(responses, stop.pad_id)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    count = -(-len(prompts) // cfg.ppo.microbatch_size)
    batch = Batch(
        tokens=torch.cat([prompt_ids, response_ids], dim=1),
        mask=mask,
        response_mask=response_mask,
        finished=torch.tensor([response[-1] in stop.stop_ids for response in responses]),
        microbatches=balanced_groups(mask.sum(1).tolist(), count),
        **{name: torch.zeros(response_mask.shape, device=device()) for name in PER_TOKEN},
        scores=torch.zeros(len(prompts), device=device()),
    )
    model.train()
    for rows in batch.microbatches:
        inputs = (batch.tokens[rows], mask[rows], response_mask[rows])
        with torch.no_grad():
            policy, values = policy_and_value(model, *inputs, generation.temperature)
            reference = response_logprobs(model, "reference", *inputs, generation.temperature)
            batch.scores[rows] = score_sequences(model, batch.tokens[rows], mask[rows])
        batch.logprobs[rows], batch.ref_logprobs[rows] = policy.logprobs, reference.logprobs
        assert values is not None
        batch.values[rows] = values
    return batch


def update(
    cfg: Config,
    model: RoleModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    advantages: Tensor,
    returns: Tensor,
    step: int,
) -> dict[str, float]:
    """Several epochs over a batch, one optimizer step per minibatch; returns losses per token."""
    section, all_mask = cfg.ppo, to_device(batch.response_mask)
    warming_up = step < section.critic_warmup_steps  # only the critic learns
    total = ppo_optimizer_steps(section)
    done, size = step * total // section.steps, microbatches_per_step(section, 1, "ppo")
    sums, all_tokens = {"policy_loss": 0.0, "value_loss": 0.0}, 0.0
    for epoch in range(section.epochs):
        generator = torch.Generator().manual_seed(hash((cfg.seed, step, epoch)) % 2**63)
        order = torch.randperm(len(batch.microbatches), generator=generator)
        for minibatch in order.split(size):
            chosen = [batch.microbatches[number] for number in minibatch.tolist()]
            num_tokens = float(sum(batch.response_mask[rows].sum() for rows in chosen))
            for rows in chosen:
                inputs = (batch.tokens[rows], batch.mask[rows], batch.response_mask[rows])
                new, values = policy_and_value(model, *inputs, cfg.generation.temperature)
                assert values is not None
                old, mask, clip = batch.logprobs[rows], all_mask[rows], section.clip_range
                policy = policy_loss(new.logprobs, old, advantages[rows], mask, clip, num_tokens)
                old, clip = batch.values[rows], section.value_clip_range
                critic = value_loss(values, old, returns[rows], mask, clip, num_tokens)
                (policy.loss * (not warming_up) + section.vf_coef * critic.loss).backward()
                sums["policy_loss"] += float(policy.loss) * num_tokens
                sums["value_loss"] += float(critic.loss) * num_tokens
            factors = ppo_lr_factors(section, done)
            for group in optimizer.param_groups:
                if group["name"] not in factors:  # without gradients AdamW passes over the policy
                    for parameter in group["params"]:
                        parameter.grad = None
                group["lr"] = section.learning_rate * factors.get(group["name"], 0.0)
                clip_grad_norm_(group["params"], section.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            all_tokens += num_tokens
            done += 1
    return {name: total / all_tokens for name, total in sums.items()}


if __name__ == "__main__":
    main()
