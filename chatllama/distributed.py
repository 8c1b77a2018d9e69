"""Which process this is, on which device, and the few collectives that we use.

The only place that asks whether there is a GPU. Works alike with one process and no launcher.
"""

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """True under `deepspeed` or `torchrun`, which set WORLD_SIZE."""
    return "WORLD_SIZE" in os.environ


def device() -> torch.device:
    """This process's device: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


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
    """True on every rank when it is true on any."""
    return bool(all_sum(torch.tensor(float(flag), device=device())) > 0)


def all_gather_objects(value: object) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def shut_down() -> None:
    """Leaves the process group in step with the others (skipping this can abort at exit)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
