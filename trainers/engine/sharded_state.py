"""Trained weights and AdamW's state on disk, independent of world size and ZeRO stage.

Each rank writes the shards it holds, as ranges of flattened parameters under their names. A start
with another world size or ZeRO stage reads the ranges that it needs. Nothing is gathered or
rounded, so the same layout reads back the same bits. Which checkpoints exist is no matter here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from chatllama.model.weight_files import write_file
from chatllama.runs.checkpoints import NotFiniteError
from chatllama.runtime.distributed import rank

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of every element."""
VALUE = "value"
STEP = "step"
"""AdamW's number of steps of a parameter, one number each; in older checkpoints one for all."""


@dataclass(frozen=True)
class Shard:
    """The range of a trained parameter that this rank's optimizer updates."""

    owner: torch.Tensor
    """What AdamW steps: the parameter, or under ZeRO a flat float32 tensor of many shards."""
    offset: int
    """First element of the range in the flattened owner."""
    start: int
    """First element of the range in the flattened parameter."""
    count: int
    """Elements of the parameter held by this rank; 0 if none."""
    swapped: int | None = None
    """DeepSpeed's number of an owner that it keeps on disk (NVMe)."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """(count,) view of a tensor with the owner's shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def shard_of(parameter: nn.Parameter, optimizer: Any) -> Shard:
    """This rank's shard of a trained parameter. The names are DeepSpeed's own (version pinned).

    Args:
        optimizer: torch's AdamW, or DeepSpeed's wrapper of it.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return Shard(parameter, 0, 0, parameter.numel())
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal shards, the last of them padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(size * rank(), num_elements(parameter))
        count = min(size, num_elements(parameter) - start)
        swapped = group if optimizer._swappable_optimizer_subgroup(group) else None
        return Shard(optimizer.fp32_partitioned_groups_flat[group], offset, start, count, swapped)
    owners = optimizer.single_partition_of_fp32_groups
    place = cast(Any, parameter)._hp_mapping  # ZeRO 1 and 2: equal cuts of all parameters in a row
    if place is None:
        return Shard(owners[0], 0, 0, 0)
    here, there = place.lp_fragment_address, place.hp_fragment_address
    return Shard(owners[place.param_group_index], there.start, here.start, here.numel)


@contextmanager
def swapped_in(shard: Shard, optimizer: Any, changed: bool = False) -> Iterator[None]:
    """The owner and its moments are in memory inside; if `changed`, they are written back."""
    if shard.swapped is None:
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(shard.swapped)
    yield
    if changed:
        optimizer._optimizer_states_and_gradient_swap_out(shard.swapped)
    else:
        optimizer._release_swap_buffers(shard.swapped)


def num_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 shards it."""
    return cast(Any, parameter).ds_numel if hasattr(parameter, "ds_id") else parameter.numel()


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 shards it."""
    return tuple(cast(Any, parameter).ds_shape if hasattr(parameter, "ds_id") else parameter.shape)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter with requires_grad."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_of(owner: torch.Tensor, optimizer: Any) -> dict[str, torch.Tensor]:
    """AdamW's state of an owner: `step` and the moments; empty before the first step."""
    plain = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return plain.state[owner]


def write_shards(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Writes this rank's file of trained weights and moments into `folder`; every rank must call.

    Args:
        folder: of the checkpoint.
        optimizer: torch's AdamW, or DeepSpeed's wrapper of it.

    Raises:
        NotFiniteError: a tensor holds NaN or infinity.
    """
    shards: dict[str, tuple[Shard, str]] = {}
    steps: dict[str, float] = {}
    replicated = isinstance(optimizer, torch.optim.Optimizer)  # rank 0 then writes for all
    for name, parameter in trained_parameters(model).items():
        shard = shard_of(parameter, optimizer)
        if not shard.count or (replicated and rank() > 0):
            continue
        state = state_of(shard.owner, optimizer)
        steps[f"{STEP}:0:{name}"] = done = float(state[STEP]) if state else 0.0
        kinds = (VALUE, *MOMENTS) if done else (VALUE,)
        shards |= {f"{kind}:{shard.start}:{name}": (shard, kind) for kind in kinds}

    def tensor(key: str) -> torch.Tensor:
        if key in steps:
            return torch.tensor([steps[key]])
        shard, kind = shards[key]
        with swapped_in(shard, optimizer):
            held = {VALUE: shard.owner, **state_of(shard.owner, optimizer)}
            if not shard.of(held[kind]).isfinite().all():
                raise NotFiniteError(f"{kind} of {key.split(':', 2)[2]} holds NaN or infinity")
            return shard.of(held[kind]).to("cpu", copy=shard.swapped is not None)

    shapes = {key: (shard.count,) for key, (shard, _) in shards.items()}
    file = folder / f"trained-{rank()}.safetensors"
    write_file(file, {**dict.fromkeys(steps, (1,)), **shapes}, torch.float32, tensor)


class SavedShards:
    """The files of all ranks, read as one.

    Args:
        folder: of the checkpoint.
        sizes: name -> elements of the parameters that are trained now.

    Raises:
        ValueError: they do not hold exactly these parameters, complete.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self.folder = folder
        self._files = [safe_open(f, "pt") for f in sorted(folder.glob("trained-*.safetensors"))]
        self._ranges: dict[tuple[str, str], dict[int, Any]] = {}
        self._steps: dict[str, torch.Tensor] = {}
        for file in self._files:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, _, rest = key.partition(":")
                start, _, name = rest.partition(":")
                if kind == STEP:
                    whose = {name: 0} if name else sizes
                    self._steps |= dict.fromkeys(whose, file.get_tensor(key)[0])
                else:
                    self._ranges.setdefault((kind, name), {})[int(start)] = file.get_slice(key)
        held = {key: sum(r.get_shape()[0] for r in rs.values()) for key, rs in self._ranges.items()}
        expected = {
            (kind, name): size
            for name, size in sizes.items()
            for kind in ((VALUE, *MOMENTS) if self.step(name) else (VALUE,))
        }
        if held != expected:
            wrong = sorted({name for (_, name), _ in held.items() ^ expected.items()})
            raise ValueError(
                f"{folder} does not hold what is trained now: {len(wrong)} of {len(sizes)} "
                f"parameters are missing, incomplete or unexpected, such as {', '.join(wrong[:3])}."
                " Checkpoints of older versions cannot be read: to start the stage afresh, remove "
                f"{folder.parent}"
            )

    def step(self, name: str) -> torch.Tensor:
        """() float32, AdamW's steps of a parameter."""
        return self._steps.get(name, torch.zeros(()))

    def read(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """(count,) float32: a range of a flattened parameter, or of one of its moments."""
        found = []
        for begin, held in sorted(self._ranges[kind, name].items(), key=lambda item: item[0]):
            first = max(start - begin, 0)
            last = min(start + count - begin, held.get_shape()[0])
            if first < last:
                found.append(held[first:last])
        return torch.cat(found) if found else torch.empty(0)


def restore_optimizer(saved: SavedShards, model: nn.Module, optimizer: Any) -> None:
    """Sets the optimizer's own copies of weights, its moments and its steps, as saved."""
    for name, parameter in trained_parameters(model).items():
        shard, step = shard_of(parameter, optimizer), saved.step(name)
        if not shard.count:  # its owner may be another group's
            continue
        state = state_of(shard.owner, optimizer)
        with swapped_in(shard, optimizer, changed=True):
            if not state:
                state |= {moment: torch.zeros_like(shard.owner) for moment in MOMENTS}
            state[STEP] = step.clone()
            for kind, tensor in {VALUE: shard.owner, **{m: state[m] for m in MOMENTS}}.items():
                if kind == VALUE or step:
                    shard.of(tensor).copy_(saved.read(kind, name, shard.start, shard.count))
                else:
                    shard.of(tensor).zero_()
