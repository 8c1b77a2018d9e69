"""Rollout batches: prompts in, responses with everything PPO needs to know about them out.

Every rank ends with the WHOLE batch (a few megabytes): sampling and scoring are dealt out over the
ranks, statistics are then those of all responses without further talk. Nothing here trains.
Shapes: B responses of all ranks, P prompt, R response, T = P + R.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from chatllama.config.schema import GenerationSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model.roles import (
    Role,
    RoleModel,
    acting_as,
    autocast,
    mergeable,
    merged_as,
)
from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences
from chatllama.runtime.distributed import (
    all_any,
    all_gather_objects,
    device,
    rank,
    to_device,
    world_size,
)
from trainers.engine.engine import Engine
from trainers.engine.microbatches import collect, deal, groups_of_like_totals
from trainers.ppo.data import StopTokens
from trainers.ppo.ppo_math import masked
from trainers.ppo.rewards import Scorer


@dataclass(frozen=True)
class Rollout:
    """Responses of one step, on every rank alike, on the CPU.

    There its statistics cost a GPU no waiting; what a forward pass needs is moved for it.
    """

    tokens: torch.Tensor
    """(B, T) int64: left-padded prompts, then right-padded responses."""
    mask: torch.Tensor
    """(B, T) bool: real tokens."""
    response_mask: torch.Tensor
    """(B, R) bool: True up to and including the first stop token."""
    finished: torch.Tensor
    """(B,) bool: the response ended by itself."""
    logprobs: torch.Tensor
    """(B, R) float32: of the policy that sampled, by the training forward pass."""
    ref_logprobs: torch.Tensor
    """(B, R) float32: of the reference."""
    entropy: torch.Tensor
    """(B, R) float32: of the policy, nats."""
    values: torch.Tensor
    """(B, R) float32: of the state before each token; zeros without a critic."""
    member_scores: torch.Tensor
    """(B, M) float32: of every reward adapter, as they come."""
    scores: torch.Tensor
    """(B,) float32: the sources' sum, not normalised."""

    @property
    def kl(self) -> torch.Tensor:
        """k1 estimate of the KL to the reference per sampled token, nats: (B, R)."""
        return self.logprobs - self.ref_logprobs

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) int64 tokens per response, its stop token included."""
        return self.response_mask.sum(1)

    def select(self, rows: Sequence[int]) -> "Rollout":
        """The given rows, with columns cut away in which none of them has a token."""
        picked = {name: value[list(rows)] for name, value in self.__dict__.items()}
        prompt_width = self.tokens.shape[1] - self.response_mask.shape[1]
        first = int(picked["mask"].any(0).long().argmax())
        length = int(picked["response_mask"].sum(1).max())
        for name in ("tokens", "mask"):
            picked[name] = picked[name][:, first : prompt_width + length]
        for name in ("response_mask", "logprobs", "ref_logprobs", "entropy", "values"):
            picked[name] = picked[name][:, :length]
        return Rollout(**picked)

    def microbatches(self, size: int) -> list[list[int]]:
        """Rows that are scored, and later learnt from, together: `size` of them on average.

        Their number is that of rows / `size`; each has about the same number of tokens, prompts and
        responses, which is what memory and time go by, since padding is not computed.
        """
        tokens = self.mask.sum(1).tolist()
        return groups_of_like_totals(tokens, -(-len(tokens) // size))

    def response_ids(self, row: int) -> list[int]:
        """The response's ids, its stop token included."""
        width = self.response_mask.shape[1]
        return self.tokens[row, -width:][self.response_mask[row]].tolist()


def sample_responses(
    engine: Engine,
    role: Role,
    prompts: Sequence[Sequence[int]],
    generation: GenerationSection,
    stop_ids: Sequence[int],
    seed: Sequence[int],
) -> list[list[int]]:
    """Responses of `role` to all prompts, on every rank, each rank sampling its share.

    Random numbers belong to (seed, prompt), so the number of ranks changes no response.

    Args:
        engine: of the roles' model; under ZeRO-3 it says whether weights are gathered first.
        role: who answers.
        prompts: token ids of all ranks' prompts.
        generation: how to sample.
        stop_ids: ids that end a response.
        seed: integers that name this batch.
    """
    generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**63)
    uniforms = torch.rand(len(prompts), generation.max_new_tokens, generator=generator)
    own = list(range(rank(), len(prompts), world_size()))
    in_step = engine.partitions() and not engine.gathers
    model = engine.model
    model.eval()
    with engine.whole(), _sampling_as(engine, role, generation), autocast(model):
        responses = generate(
            model.llama,
            [prompts[i] for i in own],
            Sampling.of(generation),
            stop_ids,
            uniforms[own],
            generation.batch_size,
            any_running=all_any if in_step else bool,
            compiled=engine.compiled if generation.compile else None,
        )
    merged: list[list[int]] = [[] for _ in prompts]
    for share in all_gather_objects(list(zip(own, responses, strict=True))):
        for i, response in share:
            merged[i] = response
    return merged


def _sampling_as(
    engine: Engine, role: Role, generation: GenerationSection
) -> AbstractContextManager[None]:
    """The role acting, its adapter merged or not."""
    model, merge = engine.model, generation.merge_lora
    possible = mergeable(model) and not engine.partitions()
    if merge == "always" and not possible:
        raise ValueError(
            "generation.merge_lora always: the backbone is quantised or split by ZeRO-3, so "
            "adapters cannot be merged into it; use auto or never"
        )
    pays = possible and model.llama.dtype == torch.float32 and not generation.compile
    if merge == "always" or (merge == "auto" and pays):
        return merged_as(model, role)
    return acting_as(model, role)


def arrange(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    """Prompts and responses as tensors, not scored yet (zeros)."""
    prompt_width, width = max(map(len, prompts)), max(map(len, responses))
    tokens = torch.full((len(prompts), prompt_width + width), pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        place = slice(prompt_width - len(prompt), prompt_width + len(response))
        tokens[row, place] = torch.tensor([*prompt, *response])
        mask[row, place] = True
    finished = torch.tensor([response[-1] in stop_ids for response in responses])
    per_token = torch.zeros(len(prompts), width)
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=mask[:, prompt_width:],
        finished=finished,
        logprobs=per_token,
        ref_logprobs=per_token,
        entropy=per_token,
        values=per_token,
        member_scores=torch.zeros(len(prompts), 0),
        scores=torch.zeros(len(prompts)),
    )


@torch.no_grad()
def score(
    model: RoleModel,
    rollout: Rollout,
    temperature: float,
    microbatch_size: int,
    reward_roles: Sequence[Role],
    reference: Role = "reference",
) -> Rollout:
    """The rollout with log-probabilities, values and rewards, dealt out over the ranks.

    Microbatch by microbatch the same rows that training will see, through the same functions, so
    that the first ratio of an update is exactly 1.

    Args:
        model: holds policy, reference and the reward roles, and value unless there is no critic.
        rollout: from `arrange`.
        temperature: at which it was sampled.
        microbatch_size: responses per forward pass, on average.
        reward_roles: whose scores to take.
        reference: whose log-probabilities the policy's are compared with.
    """
    model.train()  # as in the update; there is no dropout in PPO
    names = ("logprobs", "ref_logprobs", "entropy", "values")
    filled = {name: torch.zeros(rollout.logprobs.shape, device=device()) for name in names}
    members = torch.zeros(len(rollout.tokens), len(reward_roles), device=device())
    microbatches = rollout.microbatches(microbatch_size)
    for (number,), counts in deal(len(microbatches), 1):
        part = rollout.select(microbatches[number])
        batch = (part.tokens, part.mask, part.response_mask)
        policy, values = policy_and_value(model, *batch, temperature)
        compared = response_logprobs(model, reference, *batch, temperature)
        scores = [score_sequences(model, part.tokens, part.mask, role) for role in reward_roles]
        if not counts:
            continue
        rows, width = to_device(torch.tensor(microbatches[number])), part.response_mask.shape[1]
        filled["logprobs"][rows, :width] = policy.logprobs
        filled["ref_logprobs"][rows, :width] = compared.logprobs
        filled["entropy"][rows, :width] = policy.entropy
        if scores:
            members[rows] = torch.stack(scores, dim=1)
        if values is not None:
            filled["values"][rows, :width] = values
    collected = {name: collect(value).cpu() for name, value in filled.items()}
    return replace(rollout, **collected, member_scores=collect(members).cpu())


def collect_rollout(
    engine: Engine,
    role: Role,
    prompts: Sequence[Sequence[int]],
    prompt_texts: Sequence[str],
    generation: GenerationSection,
    ends: StopTokens,
    scorer: Scorer,
    seed: Sequence[int],
    microbatch_size: int,
    reference: Role = "reference",
    responses: list[list[int]] | None = None,
) -> tuple[Rollout, list[str]]:
    """A scored batch of `role`'s answers and their texts, on every rank alike.

    Args:
        engine: of the roles' model.
        role: who answers; log-probabilities are the policy's all the same.
        prompts: token ids of all ranks' prompts.
        prompt_texts: what reward functions are shown.
        generation: how to sample; its temperature also scores.
        ends: stop and pad ids, and how to read answers.
        scorer: makes scores.
        seed: integers that name this batch.
        microbatch_size: responses per scoring pass, on average.
        reference: whose log-probabilities the policy's are compared with.
        responses: token ids that were sampled elsewhere. None: they are sampled here.
    """
    if responses is None:
        responses = sample_responses(engine, role, prompts, generation, ends.stop_ids, seed)
    texts = [ends.decode(response) for response in responses]
    rollout = arrange(prompts, responses, ends.stop_ids, ends.pad_id)
    temperature = generation.temperature
    rollout = score(engine.model, rollout, temperature, microbatch_size, scorer.roles, reference)
    total = scorer.total(rollout.member_scores, prompt_texts, texts)
    return replace(rollout, scores=total), texts


def rollout_metrics(
    rollout: Rollout, scores: torch.Tensor, rewards: torch.Tensor
) -> dict[str, float]:
    """What a rollout batch says about the policy that sampled it.

    The KL estimates are k1: per response (summed over its tokens, with the standard error of the
    mean over responses) and per token.

    Args:
        rollout: scored.
        scores: (B,) float32, shaped.
        rewards: (B, R) float32.
    """
    mask = rollout.response_mask
    token_kl = masked(rollout.kl, mask)
    kl = token_kl.sum(1)
    # Sampled tokens are as improbable as the scored distribution says, on average.
    surprise = masked(-rollout.logprobs - rollout.entropy, mask)
    return {
        "ppo/score_mean": float(scores.mean()),
        "ppo/score_std": float(scores.std(correction=0)),
        "ppo/rm_score_mean": float(rollout.scores.mean()),
        "ppo/reward_mean": float(rewards.sum(1).mean()),
        "ppo/kl_sequence": float(kl.mean()),
        "ppo/kl_sequence_se": float(kl.std() / len(kl) ** 0.5),
        "ppo/kl_token": float(kl.sum() / mask.sum()),
        "ppo/kl_abs_max": float(token_kl.abs().max()),
        "ppo/surprise_gap": float(surprise.sum() / mask.sum()),
        "ppo/surprise_gap_se": float(surprise.square().sum().sqrt() / mask.sum()),
        "ppo/response_length": float(rollout.lengths.float().mean()),
        "ppo/eos_rate": float(rollout.finished.float().mean()),
    }
