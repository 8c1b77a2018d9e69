"""Keys and values of running rows, in memory taken once, with rows coming and going.

Row i of the batch lies in slot i, and all rows end in the same column: a new token is one column
for all of them. Rows that begin later than the first have columns before them that are masked.
"""

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

SPARE_COLUMNS = 64


class _Layer(CacheLayerMixin):
    """One layer's part of the slots, as transformers wants to see it."""

    def __init__(self, slots: "KVCache") -> None:
        super().__init__()
        # Not a circle of references: the memory goes with the batch, not with a later collection.
        self.slots: KVCache = cast(Any, weakref.proxy(slots))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, heads, _, width = key_states.shape
        shape = (self.slots.allocated, heads, self.slots.capacity, width)
        # Zeros: what is masked is still multiplied by 0, and memory as it comes may hold NaN.
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.tensors
        slots, length = self.slots, key_states.shape[2]
        if slots.prompt_of is not None:
            rows = slice(len(slots.starts), len(slots.starts) + len(slots.prompt_of))
            place = (rows, slice(None), slice(slots.end - length, slots.end))
            keys[place] = key_states[slots.prompt_of]
            values[place] = value_states[slots.prompt_of]
            return key_states, value_states
        rows, end = slice(len(slots.starts)), slots.end + length
        keys[rows, :, slots.end : end] = key_states
        values[rows, :, slots.end : end] = value_states
        return keys[rows, :, slots.low : end], values[rows, :, slots.low : end]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def rebuild(self, low: int, end: int) -> None:
        """Moves what is held into memory of the size that the slots now ask for."""
        (old_keys, old_values), rows = self.tensors, slice(len(self.slots.starts))
        self.lazy_initialization(old_keys, old_values)
        for new, old in zip(self.tensors, (old_keys, old_values), strict=True):
            new[rows, :, low:end] = old[rows, :, low:end]

    def slide(self, low: int, end: int, new_end: int) -> None:
        rows = slice(len(self.slots.starts))
        for tensor in self.tensors:
            tensor[rows, :, low - end + new_end : new_end] = tensor[rows, :, low:end].clone()

    def copy_rows(self, sources: torch.Tensor, goals: torch.Tensor) -> None:
        window = slice(self.slots.low, self.slots.end)
        for tensor in self.tensors:
            tensor[goals, :, window] = tensor[sources, :, window]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        # Prompts see themselves only; a token sees the window of all rows.
        return 0 if self.slots.prompt_of is not None else self.slots.end - self.slots.low

    def get_max_length(self) -> int:
        return self.slots.capacity


class KVCache:
    """The cache of a batch whose rows come and go.

    Args:
        num_layers: of the model.
        most: rows at a time; memory is taken as rows come.
        device: of masks and indices.
    """

    def __init__(self, num_layers: int, most: int, device: torch.device) -> None:
        self.most, self.device = most, device
        self.allocated = self.capacity = 0
        self.starts: list[int] = []
        """Column of each row's first token."""
        self.end = 0
        """Column behind the newest tokens."""
        self.prompt_of: torch.Tensor | None = None
        """While prompts are read: number of the prompt for each new row."""
        self._layers = [_Layer(self) for _ in range(num_layers)]
        self.cache = Cache(layers=list(self._layers))

    @property
    def low(self) -> int:
        """First column that any row uses."""
        return min(self.starts, default=self.end)

    def open_prompts(self, prompt_of: Sequence[int], lengths: Sequence[int], longest: int) -> None:
        """Makes room for new rows; a forward pass over their prompts, padded left, must follow.

        Args:
            prompt_of: number of the prompt of each new row: equal prompts are computed once.
            lengths: tokens of each new row's prompt.
            longest: tokens that the longest of the new rows may come to.
        """
        rows, length = len(self.starts) + len(prompt_of), max(lengths)
        assert rows <= self.most
        if not self.starts and (self.capacity > 2 * longest or self.allocated > 2 * rows):
            self.allocated = self.capacity = 0
            for layer in self._layers:
                layer.forget()
        more_rows = min(max(rows, 2 * self.allocated), self.most)
        self._resize(
            self.allocated if rows <= self.allocated else more_rows, max(longest, self.capacity)
        )
        if not self.starts:
            self.end = length
        elif self.end < length:
            self._slide(length)
        self.prompt_of = torch.tensor(list(prompt_of), device=self.device)

    def close_prompts(self, lengths: Sequence[int]) -> None:
        """The new rows count from now on; `lengths`: their prompts' tokens."""
        self.prompt_of = None
        self.starts += [self.end - length for length in lengths]

    def open_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a forward pass of one token per row needs: its mask and its positions.

        Returns:
            (n, W) int64, 1 where a column in use holds a token of the row; (n, 1) int64.
        """
        if self.end == self.capacity:
            # No row is as long as that, so there is room on the left; too little is not worth
            # moving everything for.
            if self.low < SPARE_COLUMNS:
                more = max(SPARE_COLUMNS, self.capacity // 4)
                self._resize(self.allocated, self.capacity + more)
            else:
                self._slide(self.end - self.low)
        starts = torch.tensor(self.starts, device=self.device)[:, None]
        columns = torch.arange(self.low, self.end + 1, device=self.device)
        return (columns >= starts).long(), self.end - starts

    def close_token(self) -> None:
        """The token is part of its row from now on."""
        self.end += 1

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Drops rows; the last ones take their slots.

        Returns:
            (slot left, slot taken) of each row that moved, to be followed by the caller.
        """
        moved = closing_moves(len(self.starts), rows)
        if moved:
            sources, goals = torch.tensor(moved, device=self.device).T
            for layer in self._layers:
                layer.copy_rows(sources, goals)
        for source, goal in moved:
            self.starts[goal] = self.starts[source]
        del self.starts[len(self.starts) - len(set(rows)) :]
        return moved

    def _resize(self, allocated: int, capacity: int) -> None:
        if (allocated, capacity) == (self.allocated, self.capacity):
            return
        self.allocated, self.capacity = allocated, capacity
        for layer in self._layers:
            if layer.is_initialized:
                layer.rebuild(self.low, self.end)

    def _slide(self, new_end: int) -> None:
        low, end = self.low, self.end
        for layer in self._layers:
            layer.slide(low, end, new_end)
        self.starts = [start - end + new_end for start in self.starts]
        self.end = new_end


def closing_moves(count: int, gone: Sequence[int]) -> list[tuple[int, int]]:
    """(row, place of a row that is gone) of each row that moves so that the first places are full.

    Args:
        count: rows before.
        gone: rows that leave.
    """
    leaving = set(gone)
    left = count - len(leaving)
    movers = [row for row in range(left, count) if row not in leaving]
    return list(zip(movers, sorted(row for row in leaving if row < left), strict=True))
