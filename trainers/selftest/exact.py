"""Exact values of a small world, by enumeration and without the toolkit's arithmetic.

A role is one dense LLaMA in float64 with its adapter multiplied into the weights; every prompt with
a response is its own row without padding. (RMSNorm computes in float32 all the same.)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from chatllama.model.roles import RoleModel
from trainers.selftest.world import (
    ADAPTER_WEIGHT,
    LORA,
    MAX_NEW_TOKENS,
    MISSING_EOS_PENALTY,
    PROMPTS,
    STOP,
    WORDS,
    World,
    all_responses,
    reward,
)


class DenseRole:
    """A role's weights as one dense LLaMA, differentiable with respect to its adapter.

    Args:
        adapter: PEFT names -> tensors, with or without the role's name in them; None: the base.
        head: weight and bias of a scalar head.
    """

    def __init__(
        self,
        world: World,
        adapter: Iterable[tuple[str, Tensor]] | None,
        head: tuple[Tensor, ...] = (),
    ) -> None:
        self.llama = world.new_llama().double()
        self.adapter = {
            name: tensor.detach().double().requires_grad_() for name, tensor in adapter or ()
        }
        self.head = [tensor.detach().double().requires_grad_() for tensor in head]

    @classmethod
    def saved(cls, world: World, folder: Path) -> "DenseRole":
        """The adapter in `folder`."""
        tensors = load_file(folder / "adapter_model.safetensors")
        adapter = [(name, t) for name, t in tensors.items() if ".lora_" in name]
        return cls(world, adapter, tuple(t for name, t in tensors.items() if ".lora_" not in name))

    @classmethod
    def of(cls, world: World, model: RoleModel, role: str) -> "DenseRole":
        """The adapter and head of `role` in `model`."""
        marks = (f".lora_A.{role}.", f".lora_B.{role}.")
        named = [(n, p) for n, p in model.named_parameters() if any(m in n for m in marks)]
        heads = [(n, p) for n, p in model.named_parameters() if n.startswith(f"heads.{role}.")]
        return cls(world, named, tuple(p for _, p in sorted(heads, reverse=True)))

    @property
    def parameters(self) -> list[Tensor]:
        """Adapter tensors in the given order, then the head's weight and bias."""
        return [*self.adapter.values(), *self.head]

    def gradient(self, loss: Tensor) -> Tensor:
        """Of `loss` with respect to all parameters: one float64 vector."""
        gradients = torch.autograd.grad(loss, self.parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {**dict(self.llama.named_parameters())}
        for name, a in self.adapter.items():
            if ".lora_A." not in name:
                continue
            b = self.adapter[name.replace(".lora_A.", ".lora_B.")]
            target = name.split(".lora_A.")[0]
            target = target[target.index("model.layers") :] + ".weight"
            weights[target] = weights[target] + LORA.alpha / LORA.r * b @ a
        return weights

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T, V) float64 of rows without padding."""
        return functional_call(self.llama, self._weights(), (tokens,)).logits

    def scalars(self, tokens: Tensor) -> Tensor:
        """(B, T) float64: the head's number at every position of rows without padding."""
        weights = {n.removeprefix("model."): w for n, w in self._weights().items()}
        weights.pop("lm_head.weight")
        hidden = functional_call(self.llama.model, weights, (tokens,)).last_hidden_state
        numbers = hidden @ self.head[0][0]
        return numbers + self.head[1] if len(self.head) > 1 else numbers


@dataclass(frozen=True)
class Enumeration:
    """All responses to all prompts, grouped by prompt.

    Shapes: N rows, L longest response. Positions after a response's end hold 0 or False.
    """

    world: World
    max_new_tokens: int = MAX_NEW_TOKENS
    prompts: tuple[tuple[int, ...], ...] = PROMPTS

    @cached_property
    def rows(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Prompt and response of each row."""
        responses = all_responses(self.max_new_tokens)
        return [(prompt, response) for prompt in self.prompts for response in responses]

    @cached_property
    def mask(self) -> Tensor:
        """(N, L) bool."""
        lengths = torch.tensor([len(response) for _, response in self.rows])
        return torch.arange(self.max_new_tokens)[None] < lengths[:, None]

    @cached_property
    def finished(self) -> Tensor:
        """(N,) bool: ended by the stop token."""
        return torch.tensor([response[-1] == STOP for _, response in self.rows])

    def _per_token(self, role: DenseRole, kind: str, temperature: float) -> Tensor:
        """(N, L): log-probability of each token, or the head's number before it."""
        prefixes = [r for r in all_responses(self.max_new_tokens) if r[-1] != STOP]
        table = []
        for prompt in self.prompts:
            # Every prefix is the beginning of one of the longest responses.
            longest = torch.tensor([(*prompt, *response) for response in prefixes])
            place = {r[:cut]: i for i, r in enumerate(prefixes) for cut in range(len(r))}
            if kind == "logprobs":
                numbers = (role.logits(longest) / temperature).log_softmax(-1)
            else:
                numbers = role.scalars(longest)[..., None].expand(-1, -1, 1 + len(WORDS))
            for response in all_responses(self.max_new_tokens):
                found = [
                    numbers[place[response[:t]], len(prompt) - 1 + t, token]
                    for t, token in enumerate(response)
                ]
                found += [numbers.new_zeros(())] * (self.max_new_tokens - len(response))
                table.append(torch.stack(found))
        return torch.stack(table)

    def logprobs(self, role: DenseRole, temperature: float) -> Tensor:
        """(N, L) float64, of each response's tokens."""
        return self._per_token(role, "logprobs", temperature)

    def values(self, role: DenseRole) -> Tensor:
        """(N, L) float64, of the state before each token."""
        return torch.where(self.mask, self._per_token(role, "values", 1.0), 0.0)

    def scores(self, reward_role: DenseRole) -> Tensor:
        """(N,) float64: the known reward, the reward adapter's, and the missing-EOS penalty."""
        known = [reward(self.world.text(p), self.world.text(r)) for p, r in self.rows]
        sequences = [(*p, *r) for p, r in self.rows]
        read = torch.zeros(len(sequences), dtype=torch.float64)
        for length in {len(sequence) for sequence in sequences}:
            rows = [i for i, sequence in enumerate(sequences) if len(sequence) == length]
            tokens = torch.tensor([sequences[i] for i in rows])
            read[rows] = reward_role.scalars(tokens)[:, -1].detach()
        total = torch.tensor(known).double() + ADAPTER_WEIGHT * read
        return total - MISSING_EOS_PENALTY * (~self.finished).double()

    def probabilities(self, logprobs: Tensor) -> Tensor:
        """(N,) float64 of a response and its prompt; they sum to 1 over all rows."""
        return logprobs.sum(1).exp() / len(self.prompts)

    def state_values(self, logprobs: Tensor, rewards: Tensor) -> Tensor:
        """V^pi of the state before each token, by its definition; all (N, L) float64."""
        weights, values = logprobs.sum(1).exp(), torch.zeros_like(rewards)
        for t in range(self.max_new_tokens):
            states: dict[tuple, list[int]] = {}
            for i, (prompt, response) in enumerate(self.rows):
                if t < len(response):
                    states.setdefault((prompt, response[:t]), []).append(i)
            for members in states.values():
                ahead = rewards[members, t:].sum(1)
                values[members, t] = (weights[members] * ahead).sum() / weights[members].sum()
        return values


@dataclass(frozen=True)
class Optimum:
    """pi* = pi_ref exp(r / beta) / Z of each prompt, and J* = beta log Z."""

    reference: Tensor
    """(N,) float64, log pi_ref of each response."""
    scores: Tensor
    """(N,) float64."""
    beta: float
    num_prompts: int

    def objective(self, logprobs: Tensor) -> Tensor:
        """J = E[r - beta log(pi / pi_ref)], the mean over prompts, from log pi (N,) float64."""
        gain = self.scores - self.beta * (logprobs - self.reference)
        return (logprobs.exp() * gain).sum() / self.num_prompts

    @cached_property
    def log_normalizers(self) -> Tensor:
        """(prompts,) float64: log Z."""
        exponents = (self.reference + self.scores / self.beta).view(self.num_prompts, -1)
        return exponents.logsumexp(1)

    @property
    def best(self) -> float:
        """J*."""
        return float(self.beta * self.log_normalizers.mean())

    def kl_to_best(self, logprobs: Tensor) -> float:
        """KL(pi || pi*), nats, the mean over prompts; equals (J* - J) / beta."""
        best = (self.reference + self.scores / self.beta).view(self.num_prompts, -1)
        best = (best - self.log_normalizers[:, None]).flatten()
        return float((logprobs.exp() * (logprobs - best)).sum() / self.num_prompts)
