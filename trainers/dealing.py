"""Microbatches dealt out to the ranks, so that every rank makes equally many forward passes."""

from collections.abc import Iterator

import torch

from chatllama.distributed import all_sum, rank, world_size


def deal(num_items: int, microbatch_size: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's microbatches as item numbers, and whether they count.

    Microbatch m goes to rank m mod world size. A rank that would run out gets item 0 again, which
    does not count: under ZeRO-3 all ranks must run the model equally often.

    Args:
        num_items: over all ranks.
        microbatch_size: items per forward pass.
    """
    stride = microbatch_size * world_size()
    for start in range(0, num_items, stride):
        first = start + rank() * microbatch_size
        own = list(range(first, min(first + microbatch_size, num_items)))
        yield own or [0], bool(own)


def microbatches(batch: list[int], microbatch_size: int) -> list[list[int]]:
    """This rank's share of a batch that divides evenly, microbatch m to rank m mod world size."""
    stride = microbatch_size * world_size()
    assert len(batch) % stride == 0, (len(batch), stride)
    starts = range(rank() * microbatch_size, len(batch), stride)
    return [batch[start : start + microbatch_size] for start in starts]


def collect(shares: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of tensors that are zero but for each rank's own rows."""
    return all_sum(shares)
