"""Rank and device of this process, and the few collectives that we use.

The only place that checks for a GPU. With one process and no launcher everything works the same.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """True under `deepspeed` or `torchrun`, which set WORLD_SIZE."""
    return "WORLD_SIZE" in os.environ


def nodes() -> int:
    """Number of machines of this job, set by `deepspeed` or `torchrun`; 1 without a launcher."""
    return int(os.environ.get("CROSS_SIZE") or os.environ.get("GROUP_WORLD_SIZE") or "1")


def leads_node() -> bool:
    """True for one process of each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def device() -> torch.device:
    """This process's device: its own GPU where there is one, else the CPU.

    GPUs are numbered among those that the process sees, which may be its own alone.
    """
    if gpus := visible_gpus():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    return torch.device("cpu")


def visible_gpus() -> int:
    """Number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on this process's device; from the CPU to a GPU without waiting for the copy."""
    if device().type != "cpu" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device(), non_blocking=True)


def processes_here() -> int:
    """Number of this job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def free_memory() -> int:
    """Free bytes of this process's device; on a CPU, free memory divided by its processes."""
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved(device()) - torch.cuda.memory_allocated(device())
        return torch.cuda.mem_get_info(device())[0] + cached
    import psutil

    return psutil.virtual_memory().available // processes_here()


class _Waits:
    """How long this process waits for other ranks, and over which group."""

    minutes: float = 60.0
    group: Any = None
    """A gloo group beside NCCL; None: the process group, which is gloo's then."""


_waits = _Waits()


def work_backend() -> str:
    """What the collectives of tensors go over."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def wait_limit() -> timedelta:
    """The longest wait for another rank."""
    return timedelta(minutes=_waits.minutes)


def open_groups(minutes: float) -> None:
    """Opens the process groups together with all other ranks; a no-op where they are open.

    What waits on the CPU, such as for files, servers and downloads of rank 0, goes over gloo also
    where tensors go over NCCL: gloo's start contacts every rank, NCCL's contacts none, and no GPU
    spins meanwhile.

    Args:
        minutes: limit of every wait, that for ranks which have not started included.
    """
    if dist.is_initialized():
        return
    _waits.minutes = minutes
    # A single rank meets nobody, so it needs no port, which another program may have taken.
    alone: dict[str, Any] = {}
    if world_size() == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        alone = {"store": store, "rank": 0, "world_size": 1}
    dist.init_process_group(work_backend(), timeout=wait_limit(), **alone)
    if work_backend() != "gloo":
        _waits.group = dist.new_group(backend="gloo", timeout=wait_limit())


def meet() -> None:
    """Joins the other ranks for a minute at most, if this rank has not; for one that fails early.

    Ranks of other machines wait up to `deepspeed.timeout_minutes` for a rank that ends before it
    joined them; the end of one that joined is noticed at once.
    """
    with contextlib.suppress(dist.DistError, RuntimeError):
        open_groups(minutes=1)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, on every rank (a new tensor)."""
    total = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def all_max(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of `values` over all ranks, on every rank (a new tensor)."""
    largest = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_any(flag: bool) -> bool:
    """True on every rank if `flag` is true on any."""
    return bool(all_sum(torch.tensor(float(flag), device=device())) > 0)


def all_gather_objects(value: object) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=_waits.group)
    return gathered


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` (any object), on every rank."""
    if not dist.is_initialized():
        return value
    sent = [value]
    dist.broadcast_object_list(sent, src=0, group=_waits.group)
    return sent[0]


def barrier() -> None:
    """Waits for all ranks, on the CPU: work on the GPU goes on."""
    if dist.is_initialized():
        dist.barrier(group=_waits.group)


def shut_down() -> None:
    """Closes the process group after all ranks got here; without it, exit can abort."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        _waits.group = None


def call_inside(modules: Sequence[nn.Module], function: Callable[..., T], *inputs: Any) -> T:
    """The function's result, computed within the modules' own calls: ZeRO-3 fetches their weights.

    None of the modules is inside another. The function takes the inputs in place of their forward
    methods.
    """
    if not modules:
        return function(*inputs)
    module = cast(Any, modules[0])
    assert "forward" not in vars(module)
    module.forward = lambda *given: call_inside(modules[1:], function, *given)
    try:
        return module(*inputs)
    finally:
        del module.forward
