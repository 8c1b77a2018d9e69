"""Trained weights and AdamW's state on disk, free of how ranks and ZeRO stages split them.

Each rank writes the parts it holds, as stretches of flattened parameters under their names; a
start with any other number of ranks or ZeRO stage reads the stretches that it needs. Nothing is
gathered and nothing is rounded, so the same split reads back the very same bits.
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
from chatllama.runtime.distributed import rank

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for every element."""
VALUE = "value"
STEP = "step"
"""Name of the number of optimizer steps."""


@dataclass(frozen=True)
class Share:
    """The stretch of a trained parameter that this rank's optimizer moves."""

    owner: torch.Tensor
    """What AdamW steps: the parameter, or under ZeRO a flat float32 piece with parts of many."""
    offset: int
    """Where the stretch begins in the flattened owner."""
    start: int
    """Where it begins in the flattened parameter."""
    count: int
    """Elements; 0: this rank has nothing of it."""
    swapped: int | None = None
    """DeepSpeed's number of an owner that it keeps on a disk (NVMe)."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """(count,) view of a tensor that is shaped as the owner."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def share_of(parameter: nn.Parameter, optimizer: Any) -> Share:
    """What this rank holds of a parameter. The names are DeepSpeed's own (version pinned).

    Args:
        parameter: trained.
        optimizer: torch's AdamW, or what DeepSpeed made of it.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return Share(parameter, 0, 0, parameter.numel())
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal shards, the last of them padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(size * rank(), num_elements(parameter))
        count = min(size, num_elements(parameter) - start)
        swapped = group if optimizer._swappable_optimizer_subgroup(group) else None
        return Share(optimizer.fp32_partitioned_groups_flat[group], offset, start, count, swapped)
    owners = optimizer.single_partition_of_fp32_groups
    place = cast(Any, parameter)._hp_mapping  # ZeRO 1 and 2: equal cuts of all parameters in a row
    if place is None:
        return Share(owners[0], 0, 0, 0)
    here, there = place.lp_fragment_address, place.hp_fragment_address
    return Share(owners[place.param_group_index], there.start, here.start, here.numel)


@contextmanager
def at_hand(share: Share, optimizer: Any, changed: bool = False) -> Iterator[None]:
    """The owner and its moments are in memory inside, and go back to the disk if they `changed`."""
    if share.swapped is None:
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(share.swapped)
    yield
    if changed:
        optimizer._optimizer_states_and_gradient_swap_out(share.swapped)
    else:
        optimizer._release_swap_buffers(share.swapped)


def num_elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO-3 has split it."""
    return cast(Any, parameter).ds_numel if hasattr(parameter, "ds_id") else parameter.numel()


def is_vector(parameter: nn.Parameter) -> bool:
    """Whether the whole parameter has one dimension, also where ZeRO-3 has split it."""
    whole = cast(Any, parameter).ds_shape if hasattr(parameter, "ds_id") else parameter.shape
    return len(whole) == 1


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, those that an optimizer moves."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_of(owner: torch.Tensor, optimizer: Any) -> dict[str, torch.Tensor]:
    """AdamW's state of an owner: `step` and the moments; empty before the first step."""
    plain = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return plain.state[owner]


def write_shares(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Writes this rank's file of weights and moments into `folder`; every rank must call.

    Args:
        folder: of the checkpoint.
        model: whose trained parameters.
        optimizer: torch's AdamW, or what DeepSpeed made of it.
    """
    places: dict[str, tuple[Share, str]] = {}
    steps: set[float] = set()
    whole = isinstance(optimizer, torch.optim.Optimizer)  # then all ranks hold the same
    for name, parameter in trained_parameters(model).items():
        share = share_of(parameter, optimizer)
        state = state_of(share.owner, optimizer)
        steps.add(float(state[STEP]) if state else 0.0)
        if share.count and not (whole and rank() > 0):
            kinds = (VALUE, *MOMENTS) if state else (VALUE,)
            places |= {f"{kind}:{share.start}:{name}": (share, kind) for kind in kinds}
    assert len(steps) == 1, f"parameters have made different numbers of steps: {steps}"

    def tensor(key: str) -> torch.Tensor:
        if key == STEP:
            return torch.tensor(list(steps))
        share, kind = places[key]
        with at_hand(share, optimizer):
            held = {VALUE: share.owner, **state_of(share.owner, optimizer)}
            return share.of(held[kind]).to("cpu", copy=share.swapped is not None)

    shapes = {key: (share.count,) for key, (share, _) in places.items()}
    file = folder / f"trained-{rank()}.safetensors"
    write_file(file, {STEP: (1,), **shapes}, torch.float32, tensor)


class SavedShares:
    """The files of all ranks, read as one.

    Args:
        folder: of the checkpoint.
        sizes: name -> elements of the parameters that are trained now.

    Raises:
        ValueError: they do not hold just these parameters, whole.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self.folder = folder
        self._files = [safe_open(f, "pt") for f in sorted(folder.glob("trained-*.safetensors"))]
        self._pieces: dict[tuple[str, str], dict[int, Any]] = {}
        for file in self._files:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key != STEP:
                    kind, start, name = key.split(":", 2)
                    self._pieces.setdefault((kind, name), {})[int(start)] = file.get_slice(key)
        kinds = (VALUE, *MOMENTS) if self._files and self.step else (VALUE,)
        held = {key: sum(p.get_shape()[0] for p in ps.values()) for key, ps in self._pieces.items()}
        wanted = {(kind, name): size for kind in kinds for name, size in sizes.items()}
        if held != wanted:
            wrong = sorted({name for (_, name), _ in held.items() ^ wanted.items()})
            raise ValueError(
                f"{folder} does not hold what is trained now: {len(wrong)} of {len(sizes)} "
                f"parameters are missing, in part or too many, {', '.join(wrong[:3])} among them. "
                "Checkpoints of older versions cannot be read: to start the stage afresh, remove "
                f"{folder.parent}"
            )

    @property
    def step(self) -> torch.Tensor:
        """() float32, optimizer steps."""
        return self._files[0].get_tensor(STEP)[0]

    def read(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """(count,) float32: a stretch of a flattened parameter, or of one of its moments."""
        found = []
        for begin, piece in sorted(self._pieces[kind, name].items(), key=lambda item: item[0]):
            first = max(start - begin, 0)
            last = min(start + count - begin, piece.get_shape()[0])
            if first < last:
                found.append(piece[first:last])
        return torch.cat(found) if found else torch.empty(0)


def read_moments(saved: SavedShares, model: nn.Module, optimizer: Any) -> None:
    """Sets the optimizer's own copies of weights, its moments and steps, as they were saved."""
    for name, parameter in trained_parameters(model).items():
        share = share_of(parameter, optimizer)
        state = state_of(share.owner, optimizer)
        with at_hand(share, optimizer, changed=True):
            if not state:
                state |= {moment: torch.zeros_like(share.owner) for moment in MOMENTS}
            state[STEP] = saved.step.clone()
            for kind, tensor in {VALUE: share.owner, **{m: state[m] for m in MOMENTS}}.items():
                if kind == VALUE or saved.step:
                    share.of(tensor).copy_(saved.read(kind, name, share.start, share.count))
                else:
                    share.of(tensor).zero_()
