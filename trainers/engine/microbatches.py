"""Microbatches of like size, dealt to the ranks so that all make equally many forward passes."""

import heapq
from collections.abc import Iterator, Sequence

import torch

from chatllama.runtime.distributed import all_sum, rank, world_size


def groups_of_like_totals(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Item numbers in `count` groups, none of them empty, whose lengths add up to about the same.

    From the longest on, each item joins the group that has least so far; so the largest total is
    at most 4/3 of the least that is possible (Graham 1969).

    Args:
        lengths: of the items, at least 1 each; tokens, for microbatches.
        count: of the groups, at most as many as there are items.
    """
    assert 0 < count <= len(lengths), (count, len(lengths))
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [(0, number) for number in range(count)]
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        total, number = totals[0]
        groups[number].append(item)
        heapq.heapreplace(totals, (total + lengths[item], number))
    return groups


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


def microbatches(lengths: Sequence[int], microbatch_size: int) -> list[list[int]]:
    """This rank's microbatches of a batch that divides evenly, as places in the batch.

    They hold about equally many tokens; microbatch m goes to rank m mod world size.

    Args:
        lengths: tokens of the batch's items.
        microbatch_size: items per forward pass, on average.
    """
    count, rest = divmod(len(lengths), microbatch_size)
    assert rest == 0 and count % world_size() == 0, (len(lengths), microbatch_size)
    return groups_of_like_totals(lengths, count)[rank() :: world_size()]


def collect(shares: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of tensors that are zero but for each rank's own rows."""
    return all_sum(shares)
