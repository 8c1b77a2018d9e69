"""One optimiser over a model's trained parameters, in one process or under DeepSpeed ZeRO.

With `start.py` the only module that imports deepspeed, and only when a launcher started the
process. Frozen weights keep their type and trained ones are float32: DeepSpeed's bf16 and fp16
modes are not used. Both ways give the same gradients, so that the training loops do not depend on
which one is in use.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from chatllama.config.schema import DeepSpeedSection
from chatllama.config.stages import StageSection
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.model.lora import merge_products
from chatllama.model.roles import HALF, RoleModel
from chatllama.runtime.distributed import device, is_launched, rank, world_size
from trainers.engine.group_steps import ZeroGroups, clip_groups
from trainers.engine.microbatches import Show, show_nothing
from trainers.engine.sharded_state import (
    VALUE,
    SavedShards,
    num_elements,
    restore_optimizer,
    shard_of,
    swapped_in,
    trained_parameters,
    write_shards,
)
from trainers.engine.start import gpu_as_local_rank
from trainers.engine.zero import add_hooks, remove_hooks, whole_model_fits, zero_settings


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    decays: bool = True
    """Whether weight decay applies."""


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], modified: bool = False) -> Iterator[None]:
    """Parameters are whole inside, on every rank; a no-op except under ZeRO-3.

    Args:
        modified: they change inside, equally on all ranks; rank 0's values are kept.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None):
        yield


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's shard of a parameter under ZeRO-3, else all of it."""
    return cast(Any, parameter).ds_tensor if hasattr(parameter, "ds_id") else parameter.data


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout of one step from (seed, step, rank), so that resuming needs no random state."""
    torch.manual_seed(hash((seed, step, rank())) % 2**63)


class Engine:
    """Forward, backward, step, save and load of one model.

    Args:
        model: its parameters with requires_grad are trained; moved to this rank's device.
        groups: every trained parameter, once; all float32.
        zero: ZeRO settings, used when a launcher started the process.
        accumulation_steps: backward passes per optimizer step, on one rank.
        clip_each: every group is clipped by its own norm, not all by their joint norm.
    """

    def __init__(
        self,
        model: RoleModel,
        groups: Sequence[ParameterGroup],
        section: StageSection,
        zero: DeepSpeedSection,
        accumulation_steps: int,
        clip_each: bool = False,
    ) -> None:
        trained = [parameter for group in groups for parameter in group.parameters]
        assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
        wrong = {p.dtype for p in trained} - {torch.float32}
        assert not wrong, f"trained parameters must be float32, not {wrong}"
        self.model = model
        merge_products(model)
        self.groups = [(group.name, group.learning_rate) for group in groups]
        self.trained = {group.name: group.parameters for group in groups}
        self.max_grad_norm, self._clip_each = section.max_grad_norm, clip_each
        self.accumulation_steps = accumulation_steps
        self.show: Show = show_nothing  # whoever makes the steps may set it
        self._gather: bool | Literal["auto"] = zero.gather_for_rollouts
        self._backwards = 0
        self._deepspeed: Any = None
        # Gradients of adapters are small: whole on every rank until they are reduced, once a step.
        self._reduces_once = bool(model.lora) and zero.stage > 0 and accumulation_steps > 1
        self._reduction = ExitStack()
        if not is_launched():
            model.to(device())
        decay = section.weight_decay
        self.optimizer: Any = torch.optim.AdamW(
            [
                {"params": g.parameters, "lr": g.learning_rate, "weight_decay": decay * g.decays}
                for g in groups
            ],
            betas=(section.adam_betas[0], section.adam_betas[1]),
            eps=section.adam_eps,
        )
        if is_launched():
            import deepspeed

            limit = section.max_grad_norm if zero.stage else 0.0  # stage 0 is clipped in `step`
            settings = zero_settings(
                zero,
                accumulation_steps=1 if self._reduces_once else accumulation_steps,
                max_grad_norm=limit,
                num_trained=sum(num_elements(parameter) for parameter in trained),
            )
            with gpu_as_local_rank():
                self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                    model=model, optimizer=self.optimizer, config=settings
                )
        self._zero = ZeroGroups(self.optimizer) if clip_each and self._is_zero() else None

    def __call__(self, *args: object) -> Any:
        """The model's forward pass; every pass with gradient must come through here."""
        return (self._deepspeed or self.model)(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, whose sum over ranks and microbatches is the step's loss."""
        self._backwards += 1
        if self._deepspeed is None:
            loss.backward()
            return
        if self._reduces_once and self._backwards == 1:
            self._reduction.enter_context(self._deepspeed.coalesce_grad_reduction())
        # DeepSpeed divides by its accumulation steps and averages over ranks: undo both.
        divisor = self._deepspeed.gradient_accumulation_steps() * world_size()
        self._deepspeed.backward(loss * divisor)
        if not self._reduces_once and self._backwards < self.accumulation_steps:
            self._deepspeed.step()  # ends the microbatch; weights move only at the last

    def step(self, lr_factor: float | Mapping[str, float]) -> float:
        """Updates the weights after all microbatches.

        Returns the gradient norm before clipping, of all groups that move.

        Args:
            lr_factor: multiplies every group's peak learning rate. A mapping has the groups that
                move: others rest (with `clip_each` only), and so do their moments and step counts.
        """
        assert self._backwards == self.accumulation_steps, self._backwards
        self._backwards = 0
        self._reduction.close()
        names = [name for name, _ in self.groups]
        factors = lr_factor if isinstance(lr_factor, Mapping) else dict.fromkeys(names, lr_factor)
        resting = [number for number, name in enumerate(names) if name not in factors]
        assert self._clip_each or not resting
        for group, (name, peak) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = peak * factors.get(name, 0.0)
        if self._zero is not None:
            self._zero.resting = resting
        if self._is_zero():
            self._deepspeed.step()
            norm = float(self._deepspeed.get_global_grad_norm())
            return norm if self._zero is None else self._zero.norm(norm)
        # Stage 0 reports no norm; its gradients are already averaged over ranks here.
        trained = list(self.trained.values())
        norm = clip_groups(trained, resting, self.max_grad_norm, self._clip_each)
        (self._deepspeed or self.optimizer).step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def assign(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets a trained parameter, also in the optimizer's own copy of it.

        Args:
            parameter: of one of the groups.
            value: of its whole shape, equal on all ranks.
        """
        value = value.detach().to(device=device(), dtype=parameter.dtype)
        with torch.no_grad(), gathered([parameter], modified=True):
            parameter.copy_(value)
        shard = shard_of(parameter, self.optimizer)
        with swapped_in(shard, self.optimizer, changed=True):
            shard.of(shard.owner).copy_(value.flatten()[shard.start : shard.start + shard.count])

    @torch.no_grad()
    def blend(
        self, targets: Sequence[nn.Parameter], sources: Sequence[nn.Parameter], decay: float
    ) -> None:
        """Frozen `targets` become decay * target + (1 - decay) * source, shard by shard.

        Args:
            targets: in none of the groups, since no optimizer may hold a copy of them.
            sources: of the same shapes, in the same order.
            decay: 0 copies.
        """
        for target, source in zip(targets, sources, strict=True):
            _local(target).lerp_(_local(source), 1 - decay)
            if hasattr(target, "ds_id") and target.numel() == num_elements(target):
                # Those below stage3_param_persistence_threshold are kept whole beside their shards.
                target.data.lerp_(source.data, 1 - decay)

    def whole_value(self, parameter: nn.Parameter) -> torch.Tensor:
        """A copy of the parameter, of its whole shape, on every rank."""
        with gathered([parameter]):
            return parameter.detach().clone()

    @property
    def gather_for_rollouts(self) -> bool:
        """Whether `gathered_model` gathers; all ranks decide `auto` at the first rollout."""
        if self._gather == "auto":
            self._gather = not self.is_zero3() or whole_model_fits(self.model)
        return self._gather

    @cached_property
    def compiled(self) -> StaticKVCache:
        """The compiled decode step of all rollouts (`generation.compile`)."""
        assert not self.is_zero3()
        return StaticKVCache(self.model.llama)

    @contextmanager
    def gathered_model(self) -> Iterator[None]:
        """Weights are whole on every rank inside, so that ZeRO-3 fetches nothing layer by layer.

        Without `gather_for_rollouts` they stay sharded, as in `whole_layers`.
        """
        if not (self.is_zero3() and self.gather_for_rollouts):
            with self.whole_layers():
                yield
            return
        # The hooks that fetch and release each layer's weights would release the gathered ones.
        # Their names are DeepSpeed's own (pinned; tests/engine/test_engine.py compares tokens).
        offload = self._deepspeed.optimizer.parameter_offload
        with gathered(list(self.model.parameters())):
            for parameter in cast(Iterator[Any], self.model.parameters()):
                parameter.ds_active_sub_modules.clear()
            remove_hooks(offload)
            try:
                yield
            finally:
                add_hooks(offload)

    @contextmanager
    def whole_layers(self) -> Iterator[None]:
        """Under ZeRO-3 a decoder layer's weights are fetched together, for passes without gradient.

        DeepSpeed fetches for every matrix and norm by itself otherwise: 23 times a layer with four
        roles. Float32 adapters of a 16-bit model are sent in its type, to which autocast rounds
        them anyway, since each type is fetched by itself. All ranks must make equally many passes.
        Training does without: DeepSpeed takes the gradients of what is fetched together to be there
        in every backward pass.
        """
        if not self.is_zero3():
            yield
            return
        from deepspeed.utils import set_z3_leaf_module

        offload, layers = self._deepspeed.optimizer.parameter_offload, self.model.llama.model.layers

        def fetch_together(together: bool) -> None:
            remove_hooks(offload)
            for layer in layers:
                set_z3_leaf_module(layer, together)
            add_hooks(offload)

        fetch_together(True)
        parameters = cast(list[Any], list(layers.parameters()))
        if self.model.llama.dtype in HALF:
            for parameter in parameters:
                parameter.comm_dtype = self.model.llama.dtype
        try:
            yield
        finally:
            fetch_together(False)
            for parameter in parameters:
                del parameter.ds_z3_leaf_module
                vars(parameter).pop("comm_dtype", None)

    def save(self, folder: Path, state: dict[str, Any]) -> list[str]:
        """Writes trained weights, optimizer and `state` into `folder`; every rank must call.

        Returns the names of the files that this rank has written.

        Frozen weights are left out: they come from the adapters that the stage starts from.
        """
        write_shards(folder, self.model, self.optimizer)
        if rank() == 0:
            torch.save(state, folder / "state.pt")
        return [f"trained-{rank()}.safetensors", *(["state.pt"] if rank() == 0 else [])]

    @torch.no_grad()
    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote, under any ZeRO stage and world size; returns its `state`.

        Every rank must call.

        Raises:
            ValueError: the checkpoint is an older version's, or does not hold exactly the trained
                parameters.
        """
        if not (folder / "state.pt").is_file():
            raise ValueError(
                f"{folder} was written by an older version of chatllama and cannot be resumed: to "
                f"start the stage afresh, remove {folder.parent}"
            )
        trained = trained_parameters(self.model)
        saved = SavedShards(folder, {name: num_elements(p) for name, p in trained.items()})
        for name, parameter in trained.items():
            with gathered([parameter], modified=True):
                if rank() == 0 or not hasattr(parameter, "ds_id"):  # else it comes from rank 0
                    whole = saved.read(VALUE, name, 0, parameter.numel())
                    parameter.copy_(whole.view_as(parameter))
        restore_optimizer(saved, self.model, self.optimizer)
        try:
            return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
            reason = (str(error).strip() or "it is empty").splitlines()[0]
            raise ValueError(
                f"{folder / 'state.pt'} is refused, since it is damaged or not a state that was "
                f"saved here ({reason}): remove {folder} to go on from an earlier checkpoint"
            ) from error

    def is_zero3(self) -> bool:
        """Whether parameters are sharded, and whole only inside `gathered`."""
        return self._is_zero() and self._deepspeed.zero_optimization_stage() == 3

    def _is_zero(self) -> bool:
        return self._deepspeed is not None and self._deepspeed.zero_optimization()
