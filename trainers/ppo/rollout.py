"""Rollout batches: prompts in, scored responses out. Nothing here trains.

Sampling and scoring are split over the ranks; then every rank holds the whole batch (a few
megabytes), so that its statistics need no further communication. Shapes: B responses of all ranks,
P prompt, R response, T = P + R.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chatllama.config.generation import GenerationSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model.roles import (
    HALF,
    Role,
    RoleModel,
    adapter_parameters,
    autocast,
    mergeable,
    merged_as,
    sampling_as,
    sampling_layers,
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
from chatllama.runtime.gpu import any_kernels
from chatllama.text.padding import pad_left, pad_right
from trainers.engine.engine import Engine, gathered
from trainers.engine.microbatches import (
    Show,
    balanced_groups,
    distribute,
    gather_rows,
    show_nothing,
)
from trainers.functions.sample import Sample
from trainers.ppo.data import StopTokens
from trainers.ppo.rewards import Scorer


@dataclass(frozen=True)
class Rollout:
    """Responses of one step; identical on all ranks; on the CPU, where statistics are free."""

    tokens: Tensor
    """(B, T) int64: left-padded prompts, then right-padded responses."""
    mask: Tensor
    """(B, T) bool: real tokens."""
    response_mask: Tensor
    """(B, R) bool: True up to and including the first stop token."""
    finished: Tensor
    """(B,) bool: the response ends with a stop token."""
    logprobs: Tensor
    """(B, R) float32: of the policy that sampled, by the training forward pass."""
    ref_logprobs: Tensor
    """(B, R) float32: of the reference."""
    entropy: Tensor
    """(B, R) float32: of the policy, nats."""
    values: Tensor
    """(B, R) float32: of the state before each token; zeros without a critic."""
    member_scores: Tensor
    """(B, M) float32: raw scores of every reward adapter."""
    term_scores: Tensor
    """(B, number of terms) float32: raw scores by each reward source, not weighted."""
    scores: Tensor
    """(B,) float32: the weighted sum of all reward sources, not normalised."""

    @property
    def kl(self) -> Tensor:
        """k1 estimate of the KL to the reference per sampled token, nats: (B, R)."""
        return self.logprobs - self.ref_logprobs

    @property
    def lengths(self) -> Tensor:
        """(B,) int64 tokens per response, its stop token included."""
        return self.response_mask.sum(1)

    def responses(self) -> list[list[int]]:
        """Tokens of each response, its stop token included."""
        tokens = self.tokens[:, -self.response_mask.shape[1] :]
        return [row[mask].tolist() for row, mask in zip(tokens, self.response_mask, strict=True)]

    def select(self, rows: Sequence[int]) -> "Rollout":
        """The given rows, without the columns in which none of them has a token."""
        picked = {name: value[list(rows)] for name, value in vars(self).items()}
        prompt_width = self.tokens.shape[1] - self.response_mask.shape[1]
        first = int(picked["mask"].any(0).long().argmax())
        length = int(picked["response_mask"].sum(1).max())
        for name in ("tokens", "mask"):
            picked[name] = picked[name][:, first : prompt_width + length]
        for name in ("response_mask", "logprobs", "ref_logprobs", "entropy", "values"):
            picked[name] = picked[name][:, :length]
        return Rollout(**picked)

    def microbatches(self, size: int) -> list[list[int]]:
        """Rows of each microbatch, for scoring and training alike: `size` rows on average.

        There are rows / `size` of them, with about equally many tokens: padding is not computed, so
        tokens decide time and memory.
        """
        tokens = self.mask.sum(1).tolist()
        return balanced_groups(tokens, -(-len(tokens) // size))

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
    """Responses of `role` to all prompts, on every rank; each rank samples a part of them.

    Random numbers belong to (seed, prompt number), so the number of ranks changes no response.
    Steps are compiled with `compile: true` only: the stage decides what `auto` is.
    """
    generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**63)
    uniforms = torch.rand(len(prompts), generation.max_new_tokens, generator=generator)
    own = list(range(rank(), len(prompts), world_size()))
    in_step = engine.is_zero3() and not engine.gather_for_rollouts
    model = engine.model
    model.eval()
    sampling = _sampling(engine, role, generation)
    with engine.gathered_model(), sampling, any_kernels():
        responses = generate(
            model.llama,
            [prompts[i] for i in own],
            Sampling.of(generation),
            stop_ids,
            uniforms[own],
            generation.batch_size,
            any_running=all_any if in_step else bool,
            compiled=engine.compiled if generation.compile is True else None,
            show=partial(engine.show, "sampling"),
        )
    gathered = all_gather_objects(dict(zip(own, responses, strict=True)))
    merged = {i: response for part in gathered for i, response in part.items()}
    return [merged.get(i, []) for i in range(len(prompts))]


@contextmanager
def _sampling(engine: Engine, role: Role, generation: GenerationSection) -> Iterator[None]:
    """The role active, with its adapter merged into the weights where `merge_lora` says so."""
    model, merge = engine.model, generation.merge_lora
    possible = mergeable(model) and not engine.is_zero3()
    if merge == "always" and not possible:
        raise ValueError(
            "generation.merge_lora always: the backbone is quantised or split by ZeRO-3, so "
            "adapters cannot be merged into it; use auto or never"
        )
    pays = possible and model.llama.dtype == torch.float32 and generation.compile is not True
    if merge == "always" or (merge == "auto" and pays):
        with merged_as(model, role), autocast(model):
            yield
    else:
        layers = None
        if engine.is_zero3() and not engine.gather_for_rollouts and model.llama.dtype in HALF:
            with gathered(adapter_parameters(model, role)):
                layers = sampling_layers(model, role)
        with sampling_as(model, role, layers):
            yield


def arrange(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    """Prompts and responses as tensors, not scored yet (zeros)."""
    prompt_ids, prompt_mask = pad_left(prompts, pad_id)
    response_ids, response_mask = pad_right(responses, pad_id)
    per_token = torch.zeros(response_ids.shape)
    return Rollout(
        tokens=torch.cat([prompt_ids, response_ids], dim=1),
        mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        finished=torch.tensor([response[-1] in stop_ids for response in responses]),
        logprobs=per_token,
        ref_logprobs=per_token,
        entropy=per_token,
        values=per_token,
        member_scores=torch.zeros(len(prompts), 0),
        term_scores=torch.zeros(len(prompts), 0),
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
    show: Show = show_nothing,
) -> Rollout:
    """The rollout with log-probabilities, values and rewards; each rank scores a part of it.

    Microbatches and functions are those of training, so that the first ratio of an update is
    exactly 1.

    Args:
        rollout: from `arrange`.
        temperature: at which it was sampled.
        reference: whose log-probabilities the policy's are compared with.
        show: called with the number of passes done, and of all, of this rank.
    """
    model.train()  # as in the update; there is no dropout in PPO
    names = ("logprobs", "ref_logprobs", "entropy", "values")
    filled = {name: torch.zeros(rollout.logprobs.shape, device=device()) for name in names}
    members = torch.zeros(len(rollout.tokens), len(reward_roles), device=device())
    microbatches = rollout.microbatches(microbatch_size)
    shares = list(distribute(len(microbatches), 1))
    for place, ((number,), counts) in enumerate(shares):
        show("scoring", place, len(shares))
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
    collected = {name: gather_rows(value).cpu() for name, value in filled.items()}
    return replace(rollout, **collected, member_scores=gather_rows(members).cpu())


@dataclass(frozen=True)
class Collector:
    """Collects scored rollout batches; holds what all batches of a run have in common."""

    engine: Engine
    scorer: Scorer
    stop_tokens: StopTokens
    generation: GenerationSection
    """How to sample; its temperature also scores."""
    microbatch_size: int
    """Responses per scoring pass, on average."""

    def collect(
        self,
        role: Role,
        records: Sequence[Mapping[str, Any]],
        seed: Sequence[int],
        reference: Role = "reference",
        responses: list[list[int]] | None = None,
    ) -> tuple[Rollout, list[str]]:
        """A scored batch of `role`'s answers and their texts, identical on all ranks.

        Args:
            role: who answers; log-probabilities are the policy's all the same.
            records: all ranks' prompts, as `data.py::load_prompts` gives them.
            seed: integers that name this batch.
            reference: whose log-probabilities the policy's are compared with.
            responses: token ids that were sampled elsewhere. None: they are sampled here.
        """
        engine, generation, stop = self.engine, self.generation, self.stop_tokens
        prompts = [record["input_ids"] for record in records]
        if responses is None:
            responses = sample_responses(engine, role, prompts, generation, stop.stop_ids, seed)
        texts = [stop.decode(response) for response in responses]
        rollout = arrange(prompts, responses, stop.stop_ids, stop.pad_id)
        size, roles = self.microbatch_size, self.scorer.roles
        with engine.whole_layers():
            passes = (generation.temperature, size, roles, reference, engine.show)
            rollout = score(engine.model, rollout, *passes)
        samples = list(map(Sample.of, records, texts))
        if any(term.judge for term in self.scorer.terms):
            engine.show("reward functions", 0, len(samples))
        terms = self.scorer.term_scores(rollout.member_scores, samples)
        return replace(rollout, term_scores=terms, scores=self.scorer.total(terms)), texts
