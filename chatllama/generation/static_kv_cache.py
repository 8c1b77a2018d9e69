"""Keys and values at fixed places, so that the step of one token can be compiled.

Every step computes all slots, empty ones too, over all columns: shapes never change, and what does
change (tokens, positions, keys, values) is written into tensors that stay where they are, as CUDA
graphs want it. A row begins in column 0 of its slot. Prompts are read by the model as it is.
`key_value_slots.py` is the same for steps that are not compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache, CacheLayerMixin

from chatllama.generation.kv_cache import closing_moves

COLUMNS = 256
"""The cache's length is a multiple of it, so that few prompts ask for another compilation."""
COMPILATIONS = 64
"""Of the step, in one process: one a role and size. torch's own limit of 8 is against mistakes."""


class _Layer(CacheLayerMixin):
    """One layer's part of the slots, as transformers wants to see it."""

    is_compileable = True

    def __init__(self, slots: "StaticKVCache") -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, heads, _, width = key_states.shape
        shape = (self.slots.rows, heads, self.slots.capacity, width)
        # Zeros: what is masked is still multiplied by 0, and memory as it comes may hold NaN.
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        for tensor in self.tensors:
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.slots.prompts is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            sources, columns, places = self.slots.prompts
            for cached, new in zip(self.tensors, (key_states, value_states), strict=True):
                tokens_first = new[sources[:, None], :, columns]
                cached[places, :, : columns.shape[1]] = tokens_first.transpose(1, 2)
            return key_states, value_states
        keys, values = self.tensors
        every, positions = torch.arange(len(keys), device=keys.device), self.slots.state[1]
        keys[every, :, positions] = key_states[:, :, 0]
        values[every, :, positions] = value_states[:, :, 0]
        return keys, values

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def rebuild(self) -> None:
        """Copies what is held into memory of the size that the slots now ask for."""
        if not self.is_initialized:
            return
        old = self.tensors
        self.lazy_initialization(*old)
        for new, held in zip(self.tensors, old, strict=True):
            new[: len(held), :, : held.shape[2]] = held

    # Prompts see themselves only. A step brings its own mask, and nobody asks.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.slots.capacity


class StaticKVCache:
    """The cache of a batch whose rows come and go, and the compiled step that lengthens them.

    It serves one `DecodingBatch` after another, and should: compiling takes up to a minute, and has
    to be done again for every role that acts and when the cache grows. Weights may change in
    between. Those that move to other memory are found there, but each time CUDA graphs are recorded
    anew, of which torch has enough after 128 times; so LoRA is not merged for a compiled step.

    Args:
        llama: the model, whole on this device and not quantised.
        backend: of torch.compile.

    Raises:
        ValueError: the model does not attend by `sdpa`.
    """

    def __init__(
        self, llama: LlamaForCausalLM, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        attention = llama.config._attn_implementation
        kernel = str(attention).removeprefix("chatllama_")  # the same where rows are not packed
        if kernel not in ("sdpa", "varlen"):
            raise ValueError(
                "a compiled step gives its mask in a form that only backbone.attn_implementation "
                f"sdpa takes, not {attention}"
            )
        self.llama = llama
        self.rows = self.capacity = 0
        self.state = torch.zeros(2, 0, dtype=torch.long)
        """(2, rows) int64: the newest token of each slot, and its position."""
        self.prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        """While prompts are read: (n,) the prompt of each new row, (n, P) where among the prompt's
        columns its tokens are, real ones first, (n,) its slot."""
        self._lengths: list[int] = []
        """Tokens held of each row."""
        self._places: list[int] = []
        """The rows' slots, then the free ones."""
        self._layers = [_Layer(self) for _ in range(llama.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))
        mode = "reduce-overhead" if llama.device.type == "cuda" else None  # that is, CUDA graphs
        self._decode = torch.compile(
            _decode, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )
        self._stepped = False

    def clear(self) -> None:
        """Forgets all rows."""
        self.prompts, self._lengths = None, []

    def reserve(self, rows: int, longest: int) -> None:
        """Makes room, where there is too little; the next step is compiled anew then.

        Args:
            rows: at a time.
            longest: tokens of the longest row, prompt and response.
        """
        capacity = max(self.capacity, -(-longest // COLUMNS) * COLUMNS)
        rows = max(self.rows, rows)
        if (rows, capacity) == (self.rows, self.capacity):
            return
        self._places += range(self.rows, rows)
        self.rows, self.capacity = rows, capacity
        for layer in self._layers:
            layer.rebuild()
        self.state = torch.zeros(2, rows, dtype=torch.long, device=self.llama.device)
        torch._dynamo.mark_static_address(self.state)

    def open_prompts(self, prompt_of: Sequence[int], lengths: Sequence[int], longest: int) -> None:
        """Makes room for new rows; a forward pass over their prompts, padded left, must follow.

        Args:
            prompt_of: number of the prompt of each new row: equal prompts are computed once.
            lengths: tokens of each new row's prompt.
            longest: tokens that the longest of the new rows may come to.
        """
        first, device = len(self._lengths), self.llama.device
        assert first + len(prompt_of) <= self.rows
        self.reserve(self.rows, longest)
        width = max(lengths)
        padding = width - torch.tensor(list(lengths), device=device)[:, None]
        columns = (torch.arange(width, device=device) + padding) % width
        places = torch.tensor(self._places[first : first + len(prompt_of)], device=device)
        self.prompts = (torch.tensor(list(prompt_of), device=device), columns, places)

    def close_prompts(self, lengths: Sequence[int]) -> None:
        """The new rows count from now on; `lengths`: their prompts' tokens."""
        self.prompts = None
        self._lengths += lengths

    def step(self, newest: Sequence[int]) -> torch.Tensor:
        """Last hidden states (n, H) of all rows, whose newest tokens are now cached.

        Args:
            newest: token of each row.

        Raises:
            ValueError: torch could not compile the step.
        """
        places = self._places[: len(newest)]
        state = torch.zeros(2, self.rows, dtype=torch.long)
        state[:, places] = torch.tensor([newest, self._lengths])
        self.state.copy_(state)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            with cast(Any, torch._dynamo.config).patch(recompile_limit=COMPILATIONS):
                hidden = self._decode(self.llama.model, self)
        except RuntimeError as error:
            if not self._is_compilers(error):
                raise
            raise ValueError(_explanation(error)) from error
        self._stepped = True
        self._lengths = [length + 1 for length in self._lengths]
        return hidden[torch.tensor(places, device=hidden.device)]  # a copy: graphs reuse theirs

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Drops rows; the last ones take their numbers, but stay in their slots.

        Returns:
            (number left, number taken) of each row that moved, to be followed by the caller.
        """
        moved = closing_moves(len(self._lengths), rows)
        for source, goal in moved:
            self._lengths[goal] = self._lengths[source]
            swapped = self._places[source], self._places[goal]
            self._places[goal], self._places[source] = swapped
        del self._lengths[len(self._lengths) - len(set(rows)) :]
        return moved

    def _is_compilers(self, error: RuntimeError) -> bool:
        """Whether compiling failed, not computing. Triton looks for its own compiler late."""
        from torch._dynamo.exc import TorchDynamoException

        if isinstance(error, torch.OutOfMemoryError):
            return False
        return not self._stepped or isinstance(error, TorchDynamoException)


def _decode(model: LlamaModel, slots: StaticKVCache) -> torch.Tensor:
    """Hidden states (rows, H) behind the tokens of `slots.state`. This is what is compiled."""
    tokens, positions = slots.state[0, :, None], slots.state[1, :, None]
    # An empty slot sees column 0, which it writes itself: no row of the mask is empty.
    mask = torch.arange(slots.capacity, device=tokens.device) <= positions
    out = model(
        input_ids=cast(Any, tokens),
        attention_mask=mask[:, None, None],
        position_ids=cast(Any, positions),
        past_key_values=slots.cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


def _explanation(error: RuntimeError) -> str:
    """What torch said, in one line, and what to do."""
    from torch._dynamo.exc import BackendCompilerFailed

    reason = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    told = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
    return (
        f"compiling the decode step failed: {type(reason).__name__}: {told}\n"
        "torch.compile needs a C++ compiler and Python's headers (Debian: apt install g++ "
        "python3-dev), on CUDA also Triton, which comes with torch's own wheels for Linux; or go "
        "without: generation.compile=false in a config, no --compile on a command line"
    )
