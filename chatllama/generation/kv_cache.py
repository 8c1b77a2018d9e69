"""KV cache of running rows, in memory allocated once, with rows joining and leaving.

Row i of the batch is row i of the cache, and all rows end in the same column: a new token is one
column for all of them. Rows that begin later than the first have columns before them that are
masked. The cache of compiled steps is in `static_kv_cache.py`.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from chatllama.generation.transfer import upload_ids

SPARE_COLUMNS = 64


class RowLayer(CacheLayerMixin):
    """One layer's keys and values in the cache's size: (allocated, heads, capacity, width) each."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates zeros: masked values are multiplied by 0, and unset memory may hold NaN."""
        _, heads, _, width = key_states.shape
        shape = (self.cache.allocated, heads, self.cache.capacity, width)
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def wipe(self, rows: Sequence[int]) -> None:
        """Sets cache rows to zero."""
        for tensor in self.tensors:
            tensor[list(rows)] = 0.0

    def get_max_length(self) -> int:
        """Columns."""
        return self.cache.capacity


class _Layer(RowLayer):
    cache: "KVCache"

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.tensors
        cache, length = self.cache, key_states.shape[2]
        if cache.prompt_of is not None:
            rows = slice(len(cache.starts), len(cache.starts) + len(cache.prompt_of))
            place = (rows, slice(None), slice(cache.end - length, cache.end))
            keys[place] = key_states[cache.prompt_of]
            values[place] = value_states[cache.prompt_of]
            return key_states, value_states
        rows, end = slice(len(cache.starts)), cache.end + length
        keys[rows, :, cache.end : end] = key_states
        values[rows, :, cache.end : end] = value_states
        return keys[rows, :, cache.low : end], values[rows, :, cache.low : end]

    def free(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def rebuild(self, low: int, end: int) -> None:
        """Copies the used window into memory of the cache's present size."""
        old_tensors, rows = self.tensors, slice(len(self.cache.starts))
        self.lazy_initialization(*old_tensors)
        for new, old in zip(self.tensors, old_tensors, strict=True):
            new[rows, :, low:end] = old[rows, :, low:end]

    def slide(self, low: int, end: int, new_end: int) -> None:
        rows = slice(len(self.cache.starts))
        for tensor in self.tensors:
            tensor[rows, :, low - end + new_end : new_end] = tensor[rows, :, low:end].clone()

    def copy_rows(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        window = slice(self.cache.low, self.cache.end)
        for tensor in self.tensors:
            tensor[targets, :, window] = tensor[sources, :, window]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        # Prompts attend to themselves only; a token attends to the window of all rows.
        return 0 if self.cache.prompt_of is not None else self.cache.end - self.cache.low


class KVCache:
    """The cache of a batch whose rows join and leave.

    Memory is allocated as rows join, or once where it is reserved.
    """

    def __init__(self, num_layers: int, max_rows: int, device: torch.device) -> None:
        self.max_rows, self.device = max_rows, device
        self.allocated = self.capacity = 0
        self._reserved = False
        self.starts: list[int] = []
        """Column of each row's first token."""
        self.end = 0
        """Column behind the newest tokens."""
        self.prompt_of: torch.Tensor | None = None
        """While prompts are read: number of the prompt for each new row."""
        # No reference cycle: the memory is freed with the batch, not by a later collection.
        proxy = weakref.proxy(self)
        self._layers = [_Layer(proxy) for _ in range(num_layers)]
        self.cache = Cache(layers=list(self._layers))

    @property
    def low(self) -> int:
        """First column that any row uses."""
        return min(self.starts, default=self.end)

    def reserve(self, longest: int) -> None:
        """Makes the next allocation the last: room for `max_rows` rows of `longest` tokens."""
        assert not self.allocated
        self.allocated, self.capacity, self._reserved = self.max_rows, longest, True

    def open_prompts(self, prompt_of: Sequence[int], lengths: Sequence[int], longest: int) -> None:
        """Makes room for new rows; a forward pass over their prompts, padded left, must follow.

        Args:
            prompt_of: number of the prompt of each new row: equal prompts are computed once.
            lengths: tokens of each new row's prompt.
            longest: upper bound on the tokens of any new row, response included.
        """
        rows, length = len(self.starts) + len(prompt_of), max(lengths)
        assert rows <= self.max_rows
        wide = self.capacity > 2 * longest or self.allocated > 2 * rows
        if wide and not self.starts and not self._reserved:
            self.allocated = self.capacity = 0
            for layer in self._layers:
                layer.free()
        allocated = self.allocated
        if rows > allocated:
            allocated = min(max(rows, 2 * allocated), self.max_rows)
        self._resize(allocated, max(longest, self.capacity))
        if not self.starts:
            self.end = length
        elif self.end < length:
            self._slide(length)
        self.prompt_of = upload_ids(prompt_of, self.device)

    def close_prompts(self, lengths: Sequence[int]) -> None:
        """Adds the new rows; `lengths`: their prompts' tokens."""
        self.prompt_of = None
        self.starts += [self.end - length for length in lengths]

    def abandon_prompts(self, first: int) -> None:
        """Removes the rows from `first` on, however far the reading of their prompts has come."""
        self.prompt_of = None
        del self.starts[first:]
        for layer in self._layers:
            if layer.is_initialized:
                layer.wipe(range(first, len(layer.tensors[0])))

    def open_token(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mask and positions for a forward pass of one token per row.

        Returns:
            (n, W) bool, True where a column in use holds a token of the row, or None where all do;
            (n, 1) int64.
        """
        if self.end == self.capacity:
            # No row is that long, so there is room on the left. Moving everything for a few columns
            # is avoided where more memory may be allocated.
            if self.low < SPARE_COLUMNS and not self._reserved:
                more = max(SPARE_COLUMNS, self.capacity // 4)
                self._resize(self.allocated, self.capacity + more)
            else:
                self._slide(self.end - self.low)
        starts = upload_ids(self.starts, self.device)[:, None]
        if self.low == max(self.starts):
            return None, self.end - starts
        columns = torch.arange(self.low, self.end + 1, device=self.device)
        return columns >= starts, self.end - starts

    def close_token(self) -> None:
        """Adds the token's column to the rows."""
        self.end += 1

    def wipe(self, rows: Sequence[int]) -> None:
        """Sets to zero what is cached of some rows, which may hold NaN."""
        for layer in self._layers if rows else []:
            layer.wipe(rows)

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Removes rows; the last rows move into the gaps.

        Returns:
            (old row, new row) of each row that moved; the caller must move its own data alike.
        """
        moved = closing_moves(len(self.starts), rows)
        if moved:
            sources, targets = (upload_ids(rows, self.device) for rows in zip(*moved, strict=True))
            for layer in self._layers:
                layer.copy_rows(sources, targets)
        for source, target in moved:
            self.starts[target] = self.starts[source]
        del self.starts[len(self.starts) - len(set(rows)) :]
        return moved

    def _resize(self, allocated: int, capacity: int) -> None:
        if (allocated, capacity) == (self.allocated, self.capacity):
            return
        before = self.allocated, self.capacity
        self.allocated, self.capacity = allocated, capacity
        try:
            for layer in self._layers:
                if layer.is_initialized:
                    layer.rebuild(self.low, self.end)
        except Exception:  # some layers have more memory now, which does no harm
            self.allocated, self.capacity = before
            raise

    def _slide(self, new_end: int) -> None:
        low, end = self.low, self.end
        for layer in self._layers:
            layer.slide(low, end, new_end)
        self.starts = [start - end + new_end for start in self.starts]
        self.end = new_end


def takes_boolean_mask(llama: LlamaForCausalLM) -> bool:
    """Whether the model's attention takes a finished mask, True at what a query sees."""
    kernel = str(llama.config._attn_implementation).removeprefix("chatllama_")
    return kernel in ("sdpa", "varlen")  # the same where rows are not packed


def attention_mask(
    llama: LlamaForCausalLM, seen: torch.Tensor | None, num_queries: int
) -> torch.Tensor | None:
    """What to give transformers, so that it does not wait for the device to look at the mask.

    Args:
        llama: a mask that its attention does not take is left to transformers, which looks.
        seen: (n, W) bool, True where a column holds a token of the row. None: everywhere.
        num_queries: tokens of each row, in the last columns.

    Returns:
        (n, 1, num_queries, W) bool, True at what a query sees; or `seen` as (n, W) int64; or None.
    """
    if seen is None or not takes_boolean_mask(llama):
        return seen if seen is None else seen.long()
    if num_queries == 1:
        return seen[:, None, None]
    width = seen.shape[1]
    causal = torch.ones(num_queries, width, dtype=torch.bool, device=seen.device)
    return seen[:, None, None] & causal.tril(width - num_queries)


def closing_moves(count: int, removed: Sequence[int]) -> list[tuple[int, int]]:
    """(old row, new row) of each of `count` rows that moves so that no gap is left."""
    leaving = set(removed)
    left = count - len(leaving)
    movers = [row for row in range(left, count) if row not in leaving]
    return list(zip(movers, sorted(row for row in leaving if row < left), strict=True))
