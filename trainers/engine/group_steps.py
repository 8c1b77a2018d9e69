"""Parameter groups that are clipped by their own gradient norms, and groups that rest for a step.

A resting group keeps its weights, AdamW's moments and its step count.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from chatllama.runtime.distributed import all_sum, device


def clip_groups(
    groups: Sequence[Sequence[nn.Parameter]], resting: Collection[int], max_norm: float, each: bool
) -> float:
    """Clips the gradients of plain parameters; returns their joint norm before.

    Args:
        groups: whose gradients are whole, and equal on all ranks.
        resting: numbers of groups whose gradients are dropped.
        each: clips every group by its own norm; else all by their joint norm.
    """
    for number in resting:
        for parameter in groups[number]:
            parameter.grad = None
    together = groups if each else [[p for group in groups for p in group]]
    norms = [nn.utils.clip_grad_norm_(group, max_norm) for group in together]
    return math.hypot(*torch.stack(norms).tolist())


class ZeroGroups:
    """The same for an optimizer of ZeRO 1, 2 or 3, of which it replaces methods.

    Their names are DeepSpeed's own (pinned; tests/engine/test_engine.py compares the weights).
    """

    def __init__(self, optimizer: Any) -> None:
        self.resting: Collection[int] = ()
        self._norms: list[torch.Tensor] = []
        self._clip, self._step = optimizer.unscale_and_clip_grads, optimizer._optimizer_step
        optimizer._optimizer_step = self._step_unless_resting
        self._parts: dict[int, int] | None = None
        """ZeRO-3: group of each sub-group, which are clipped and stepped one after another."""
        if hasattr(optimizer, "sub_group_to_group_id"):
            self._parts, self._measure = optimizer.sub_group_to_group_id, optimizer._get_norm_groups
            optimizer._get_norm_groups = self._measure_parts
            optimizer.unscale_and_clip_grads = self._clip_part
        else:
            optimizer.unscale_and_clip_grads = self._clip_group

    def norm(self, of_all: float) -> float:
        """Joint gradient norm, before clipping, of the groups that moved in the last step.

        Args:
            of_all: DeepSpeed's own, which makes no step where it is not finite.
        """
        norms, self._norms = self._norms, []
        if not math.isfinite(of_all):
            return of_all
        numbers = enumerate(torch.stack(norms).tolist())
        return math.hypot(*(norm for n, norm in numbers if self._group_of(n) not in self.resting))

    def _group_of(self, number: int) -> int:
        return number if self._parts is None else self._parts[number]

    def _step_unless_resting(self, number: int) -> None:
        if self._group_of(number) not in self.resting:
            self._step(number)

    def _clip_group(self, gradients: list[torch.Tensor], joint_norm: torch.Tensor) -> None:
        """ZeRO 1 and 2: `gradients` holds this rank's part of one group's."""
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        self._norms.append(all_sum(squares.to(device())).sqrt())
        self._clip(gradients, self._norms[-1].to(squares.device))

    def _measure_parts(self) -> list[torch.Tensor]:
        self._norms = list(self._measure())
        return self._norms

    def _clip_part(self, number: int, joint_norm: torch.Tensor) -> None:
        group = self._group_of(number)
        own = [norm for n, norm in enumerate(self._norms) if self._group_of(n) == group]
        self._clip(number, torch.stack(own).norm())
