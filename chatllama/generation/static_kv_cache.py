"""KV cache at fixed addresses, so that the step of one token can be compiled.

Every step computes all cache rows, empty ones too, over all columns: shapes never change, and what
does change (tokens, positions, keys, values) is written into tensors at fixed addresses, as CUDA
graphs require. A row begins in column 0 of its cache row. Prompts are read uncompiled. The cache
for uncompiled steps is in `kv_cache.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache

from chatllama.generation.kv_cache import RowLayer, closing_moves, takes_boolean_mask
from chatllama.generation.transfer import upload, upload_ids

COLUMNS = 256
"""The cache's length is a multiple of it, so that few prompts cause another compilation."""
COMPILATIONS = 64
"""Limit per process: one for each role and size. torch's default of 8 would be too few."""


class _Layer(RowLayer):
    cache: "StaticKVCache"
    is_compileable = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for tensor in self.tensors:
            torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache.prompts is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            sources, columns, places = self.cache.prompts
            for cached, new in zip(self.tensors, (key_states, value_states), strict=True):
                tokens_first = new[sources[:, None], :, columns]
                cached[places, :, : columns.shape[1]] = tokens_first.transpose(1, 2)
            return key_states, value_states
        keys, values = self.tensors
        every, positions = torch.arange(len(keys), device=keys.device), self.cache.state[1]
        keys[every, :, positions] = key_states[:, :, 0]
        values[every, :, positions] = value_states[:, :, 0]
        return keys, values

    def rebuild(self) -> None:
        """Copies the tensors into memory of the cache's present size."""
        if not self.is_initialized:
            return
        old = self.tensors
        self.lazy_initialization(*old)
        for new, before in zip(self.tensors, old, strict=True):
            new[: len(before), :, : before.shape[2]] = before

    # Prompts attend to themselves only. A step passes its own mask and does not call these.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


class StaticKVCache:
    """The cache of a batch whose rows join and leave, and the compiled step that lengthens them.

    Reuse it for one `DecodingBatch` after another: compiling takes up to a minute, once for every
    active adapter and size of the cache. Weights may change in between. If they move to other
    memory, CUDA graphs are recorded again, which torch does 128 times at most; so LoRA is not
    merged for a compiled step.

    The model must be whole on this device, not quantised, with `sdpa` or `varlen` attention.
    """

    def __init__(
        self, llama: LlamaForCausalLM, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        if not takes_boolean_mask(llama):
            raise ValueError(
                "a compiled step passes its mask in a form that only backbone.attn_implementation "
                f"sdpa takes, not {llama.config._attn_implementation}"
            )
        self.llama = llama
        self.allocated = self.capacity = 0
        self.state = torch.zeros(2, 0, dtype=torch.long)
        """(2, allocated) int64: the newest token of each cache row, and its position."""
        self.prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        """While prompts are read: (n,) the prompt of each new row, (n, P) where among the prompt's
        columns its tokens are, real ones first, (n,) its cache row."""
        self._lengths: list[int] = []
        """Tokens of each row in the cache."""
        self._places: list[int] = []
        """Cache rows of the batch's rows, then the free ones."""
        self._layers = [_Layer(self) for _ in range(llama.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))
        mode = "reduce-overhead" if llama.device.type == "cuda" else None  # with CUDA graphs
        self._decode = torch.compile(
            _decode, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )
        self._stepped = False

    def clear(self) -> None:
        """Removes all rows."""
        self.prompts, self._lengths = None, []

    def reserve(self, rows: int, longest: int) -> None:
        """Grows the cache if it is too small for `rows` rows of at most `longest` tokens.

        The next step is compiled again then.
        """
        capacity = max(self.capacity, -(-longest // COLUMNS) * COLUMNS)
        rows = max(self.allocated, rows)
        if (rows, capacity) == (self.allocated, self.capacity):
            return
        self._places += range(self.allocated, rows)
        self.allocated, self.capacity = rows, capacity
        for layer in self._layers:
            layer.rebuild()
        self.state = torch.zeros(2, rows, dtype=torch.long, device=self.llama.device)
        torch._dynamo.mark_static_address(self.state)

    def open_prompts(self, prompt_of: Sequence[int], lengths: Sequence[int], longest: int) -> None:
        """As `KVCache.open_prompts`."""
        first, device = len(self._lengths), self.llama.device
        assert first + len(prompt_of) <= self.allocated
        self.reserve(self.allocated, longest)
        width = max(lengths)
        padding = width - upload_ids(lengths, device)[:, None]
        columns = (torch.arange(width, device=device) + padding) % width
        places = upload_ids(self._places[first : first + len(prompt_of)], device)
        self.prompts = (upload_ids(prompt_of, device), columns, places)

    def close_prompts(self, lengths: Sequence[int]) -> None:
        """Adds the new rows; `lengths`: their prompts' tokens."""
        self.prompts = None
        self._lengths += lengths

    def step(self, newest: Sequence[int]) -> torch.Tensor:
        """Last hidden states (n, H) of all rows, after adding the newest token of each."""
        places = self._places[: len(newest)]
        state = torch.zeros(2, self.allocated, dtype=torch.long)
        state[:, places] = torch.tensor([newest, self._lengths])
        self.state.copy_(upload(state, self.state.device))
        torch.compiler.cudagraph_mark_step_begin()
        try:
            with cast(Any, torch._dynamo.config).patch(recompile_limit=COMPILATIONS):
                hidden = self._decode(self.llama.model, self)
        except RuntimeError as error:
            if not self._is_from_compiler(error):
                raise
            raise ValueError(_explanation(error)) from error
        self._stepped = True
        self._lengths = [length + 1 for length in self._lengths]
        return hidden[upload_ids(places, hidden.device)]  # a copy: graphs reuse the memory

    def wipe(self, rows: Sequence[int]) -> None:
        """As `KVCache.wipe`."""
        for layer in self._layers if rows else []:
            layer.wipe([self._places[row] for row in rows])

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Removes rows as `KVCache.remove`; the rows that move keep their cache rows."""
        moved = closing_moves(len(self._lengths), rows)
        places = self._places
        for source, target in moved:
            self._lengths[target] = self._lengths[source]
            places[target], places[source] = places[source], places[target]
        del self._lengths[len(self._lengths) - len(set(rows)) :]
        return moved

    def _is_from_compiler(self, error: RuntimeError) -> bool:
        """Whether compiling failed, not computing; Triton compiles as late as the first step."""
        from torch._dynamo.exc import TorchDynamoException

        if isinstance(error, torch.OutOfMemoryError):
            return False
        return not self._stepped or isinstance(error, TorchDynamoException)


def _decode(model: LlamaModel, static: StaticKVCache) -> torch.Tensor:
    """Hidden states (allocated, H) of the tokens in `static.state`; the compiled function."""
    tokens, positions = static.state[0, :, None], static.state[1, :, None]
    # An empty cache row attends to column 0, which it writes itself: no row of the mask is empty.
    mask = torch.arange(static.capacity, device=tokens.device) <= positions
    out = model(
        input_ids=cast(Any, tokens),
        attention_mask=mask[:, None, None],
        position_ids=cast(Any, positions),
        past_key_values=static.cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


def _explanation(error: RuntimeError) -> str:
    """The compiler's error in one line, with the remedy."""
    from torch._dynamo.exc import BackendCompilerFailed

    reason = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    first = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
    return (
        f"compiling the decode step failed: {type(reason).__name__}: {first}\n"
        "torch.compile needs a C++ compiler and Python's headers (Debian: apt install g++ "
        "python3-dev), on CUDA also Triton, which comes with torch's own wheels for Linux; or go "
        "without: generation.compile=false in a config, no --compile on a command line"
    )
