"""Which microbatches each rank computes: of like size, and equally many on every rank."""

import heapq
from collections.abc import Callable, Iterator, Sequence

import torch

from chatllama.runtime.distributed import all_sum, rank, world_size


def balanced_groups(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Item numbers in `count` groups, none of them empty, of about equal total length.

    Longest first, each item joins the group with the smallest total, so the largest total is at
    most 4/3 of the best possible (Graham 1969).

    Args:
        lengths: tokens of each item, at least 1.
        count: groups, at most as many as items.
    """
    assert 0 < count <= len(lengths), (count, len(lengths))
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [(0, number) for number in range(count)]
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        total, number = totals[0]
        groups[number].append(item)
        heapq.heapreplace(totals, (total + lengths[item], number))
    return groups


Show = Callable[[str, int, int], object]
"""Takes a phase of the running step, how many of its parts are done, and how many there are."""


def show_nothing(phase: str, done: int, total: int) -> None:
    """A `Show` for steps that nobody watches."""


def distribute(num_items: int, microbatch_size: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's microbatches as item numbers, and whether they count.

    Microbatch m goes to rank m mod world size. A rank without one gets item 0, which does not
    count, because under ZeRO-3 all ranks must run the model equally often.

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
        lengths: tokens of each item of the batch.
        microbatch_size: items per forward pass, on average.
    """
    count, rest = divmod(len(lengths), microbatch_size)
    assert rest == 0 and count % world_size() == 0, (len(lengths), microbatch_size)
    return balanced_groups(lengths, count)[rank() :: world_size()]


def gather_rows(own_rows: torch.Tensor) -> torch.Tensor:
    """All-gather, as an all-reduce of tensors that are zero except in each rank's own rows."""
    return all_sum(own_rows)
