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
    """This process's device: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


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


def meet() -> None:
    """Opens the process group, if it is not open yet, and waits up to a minute for all ranks.

    Ranks of other machines wait half an hour for a rank that ends before it joined the group; the
    end of one that joined is noticed at once.
    """
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        with contextlib.suppress(dist.DistError, RuntimeError):
            dist.init_process_group(backend, timeout=timedelta(minutes=1))


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
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` (any object), on every rank."""
    if not dist.is_initialized():
        return value
    sent = [value]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def shut_down() -> None:
    """Closes the process group after all ranks got here; without it, exit can abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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
