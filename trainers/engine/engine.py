"""One optimiser over a model's trainable parameters, in one process or under DeepSpeed ZeRO.

The only module that imports deepspeed, and only when a launcher started the process. Weights keep
their own types (frozen base in its own, trainable float32): DeepSpeed's bf16 and fp16 modes are
not used. Both engines give the same gradients, so the loops above do not know which one runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from chatllama.config.schema import DeepSpeedSection
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.model.lora import merge_products
from chatllama.model.roles import RoleModel
from chatllama.runtime.distributed import (
    device,
    is_launched,
    rank,
    world_size,
)
from trainers.engine.sharded_state import (
    VALUE,
    SavedShares,
    at_hand,
    num_elements,
    read_moments,
    share_of,
    trained_parameters,
    write_shares,
)
from trainers.engine.zero import whole_model_fits, zero_settings


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as the stage's section describes it."""

    betas: Sequence[float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    """Global norm over all ranks."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    decays: bool = True
    """Whether weight decay applies."""


def initialise() -> None:
    """Joins the other ranks; must come before any model or Trainer is made. One process: no-op."""
    if not is_launched():
        return
    import deepspeed

    # The shared-memory op wants a C++ compiler and 40 s at first use; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device().type == "cuda":
        torch.cuda.set_device(device())
    deepspeed.init_distributed(verbose=False)
    assert torch.distributed.get_world_size() == world_size()


@contextmanager
def partitioned_loading(section: DeepSpeedSection, dtype: str) -> Iterator[None]:
    """Models loaded inside are split over the ranks as they are read (ZeRO-3 only).

    Args:
        section: only stage 3 splits.
        dtype: of the weights, `float32` or `bfloat16`.
    """
    if not (is_launched() and section.stage == 3):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = zero_settings(section, microbatch_size=1, accumulation_steps=1, max_grad_norm=1.0)
    settings["bf16"] = {"enabled": dtype == "bfloat16"}  # else zero.Init makes float32 of all
    keep = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del keep
        unset_hf_deepspeed_config()


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], modified: bool = False) -> Iterator[None]:
    """Parameters are whole inside, on every rank (a no-op but under ZeRO-3).

    Args:
        parameters: which.
        modified: they change inside, alike on all ranks; rank 0's values are kept.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None):
        yield


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    return cast(Any, parameter).ds_tensor if hasattr(parameter, "ds_id") else parameter.data


@torch.no_grad()
def restore(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Weights and optimizer become those that `write_shares` wrote; every rank must call.

    Args:
        folder: of the checkpoint.
        model: its trained parameters have the names they had.
        optimizer: torch's AdamW, or what DeepSpeed made of it.

    Raises:
        ValueError: the checkpoint does not hold just the trained parameters.
    """
    trained = trained_parameters(model)
    saved = SavedShares(folder, {name: num_elements(p) for name, p in trained.items()})
    for name, parameter in trained.items():
        with gathered([parameter], modified=True):
            if rank() == 0 or not hasattr(parameter, "ds_id"):  # else it comes from rank 0
                whole = saved.read(VALUE, name, 0, parameter.numel())
                parameter.copy_(whole.view_as(parameter))
    read_moments(saved, model, optimizer)


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout of one step from (seed, step, rank): resuming needs no state."""
    torch.manual_seed(hash((seed, step, rank())) % 2**63)


class Engine:
    """Forward, backward, step, save and load of one model.

    Args:
        model: its parameters with requires_grad are trained; moved to this rank's device.
        groups: every trainable parameter, once.
        settings: AdamW and clipping.
        section: ZeRO settings, used when a launcher started the process.
        microbatch_size: sequences per forward pass, on one rank.
        accumulation_steps: backward passes per optimizer step.
    """

    def __init__(
        self,
        model: RoleModel,
        groups: Sequence[ParameterGroup],
        settings: OptimizerSettings,
        section: DeepSpeedSection,
        *,
        microbatch_size: int,
        accumulation_steps: int,
    ) -> None:
        grouped = {id(p) for group in groups for p in group.parameters}
        assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 for group in groups for p in group.parameters)
        self.model = model
        merge_products(model)
        self.groups = [(group.name, group.learning_rate) for group in groups]
        self.trained = {group.name: group.parameters for group in groups}
        self.max_grad_norm = settings.max_grad_norm
        self.accumulation_steps = accumulation_steps
        self._gathers: bool | Literal["auto"] = section.gather_for_rollouts
        self._backwards = 0
        self._deepspeed: Any = None
        if not is_launched():
            model.to(device())
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": group.parameters,
                    "lr": group.learning_rate,
                    "weight_decay": settings.weight_decay if group.decays else 0.0,
                }
                for group in groups
            ],
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
        )
        self.optimizer: Any = optimizer
        if is_launched():
            import deepspeed

            self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=zero_settings(
                    section,
                    microbatch_size=microbatch_size,
                    accumulation_steps=accumulation_steps,
                    max_grad_norm=settings.max_grad_norm,
                ),
            )

    def __call__(self, *args: object) -> Any:
        """The model's forward pass; every pass with gradient must come through here."""
        return (self._deepspeed or self.model)(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, whose sum over ranks and microbatches is the step's loss."""
        self._backwards += 1
        if self._deepspeed is None:
            loss.backward()
        else:
            # DeepSpeed divides by accumulation steps and averages over ranks: undo both.
            self._deepspeed.backward(loss * (self.accumulation_steps * world_size()))
            if self._backwards < self.accumulation_steps:
                self._deepspeed.step()  # closes the microbatch; weights move only at the last

    def step(self, lr_factor: float, resting: Sequence[str] = ()) -> float:
        """Moves the weights once all microbatches are in; returns the norm before clipping.

        Args:
            lr_factor: multiplies every group's peak learning rate.
            resting: names of groups that stay as they are in this step.
        """
        assert self._backwards == self.accumulation_steps, self._backwards
        self._backwards = 0
        for group, (name, peak) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = 0.0 if name in resting else peak * lr_factor
        if self._deepspeed is not None and self._deepspeed.zero_optimization():
            self._deepspeed.step()
            return float(self._deepspeed.get_global_grad_norm())
        # Stage 0 reports no norm; its gradients are already averaged over ranks by now.
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        (self._deepspeed or self.optimizer).step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def assign(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets a trainable parameter, in the optimizer's own copy of it too.

        Args:
            parameter: one of the groups'.
            value: of its whole shape, equal on all ranks.
        """
        value = value.detach().to(device=device(), dtype=parameter.dtype)
        with torch.no_grad(), gathered([parameter], modified=True):
            parameter.copy_(value)
        share = share_of(parameter, self.optimizer)
        with at_hand(share, self.optimizer, changed=True):
            share.of(share.owner).copy_(value.flatten()[share.start : share.start + share.count])

    @torch.no_grad()
    def blend(
        self,
        targets: Sequence[nn.Parameter],
        sources: Sequence[nn.Parameter],
        decay: float,
    ) -> None:
        """Frozen `targets` become decay * target + (1 - decay) * source, shard by shard.

        Args:
            targets: not of the groups: no optimizer holds a copy of them.
            sources: of the same shapes, in the same order.
            decay: 0 copies.
        """
        for target, source in zip(targets, sources, strict=True):
            _local(target).lerp_(_local(source), 1 - decay)
            if hasattr(target, "ds_id") and target.numel() == num_elements(target):
                # Small ones (stage3_param_persistence_threshold) lie whole beside their shards.
                target.data.lerp_(source.data, 1 - decay)

    def whole_value(self, parameter: nn.Parameter) -> torch.Tensor:
        """A copy of the parameter's value, of its whole shape, on every rank."""
        with gathered([parameter]):
            return parameter.detach().clone()

    @property
    def gathers(self) -> bool:
        """Whether `whole` brings the model to every rank (`gather_for_rollouts`).

        `auto` is settled by all ranks together when they first ask, before the first rollout.
        """
        if self._gathers == "auto":
            self._gathers = not self.partitions() or whole_model_fits(self.model)
        return self._gathers

    @cached_property
    def compiled(self) -> StaticKVCache:
        """The compiled decode step of all rollouts (`generation.compile`)."""
        assert not self.partitions()
        return StaticKVCache(self.model.llama)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Weights are whole on every rank inside, without ZeRO-3's traffic layer by layer.

        Where not `gathers` they stay split: every forward pass fetches layer by layer, and all
        ranks must make equally many of them.
        """
        if not (self.partitions() and self.gathers):
            yield
            return
        # The hooks that fetch and drop each layer's weights would drop the gathered ones; their
        # names are DeepSpeed's own (pinned; tests/engine/test_engine.py compares the tokens).
        offload = self._deepspeed.optimizer.parameter_offload
        with gathered(list(self.model.parameters())):
            for parameter in cast(Iterator[Any], self.model.parameters()):
                parameter.ds_active_sub_modules.clear()
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                coordinator = offload.param_coordinator
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Writes trainable weights, optimizer and `state` below `folder`; every rank must call.

        Frozen weights are not in it: they come from the adapters that the stage started from.
        """
        write_shares(folder, self.model, self.optimizer)
        if rank() == 0:
            torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote, under any ZeRO stage and on any ranks; returns its `state`.

        Raises:
            ValueError: the checkpoint does not hold just the trained parameters.
        """
        if not (folder / "state.pt").is_file():
            raise ValueError(
                f"{folder} was written by a version of chatllama that trained otherwise, and it "
                f"cannot go on from there: remove {folder.parent} to start the stage afresh"
            )
        restore(folder, self.model, self.optimizer)
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)

    def partitions(self) -> bool:
        """True under ZeRO-3, where parameters are whole only inside `gathered`."""
        return self._deepspeed is not None and self._deepspeed.zero_optimization_stage() == 3
