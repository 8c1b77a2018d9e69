"""Bytes of one pass through the model: what autograd keeps, what comes and goes, logits, KV cache.

Closed forms, read off the operators that the layers call: H hidden, I intermediate, q and k the
widths of all query and key heads, N tokens of a pass, S positions whose state is read. The tests
run the same code on tensors without numbers and compare.
"""

from dataclasses import dataclass

from chatllama.config.model import LoraSection
from chatllama.planning.shape import ModelShape

GPU_CHUNK, CPU_CHUNK = 2**25, 2**22
"""Logits in memory at a time, in training and scoring."""
PROMPT_TOKENS = 16_384
"""Of a rollout's prompts that are read at once, padding included."""
INPUT = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention"}
INPUT |= {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "product"}
"""Matrices of one input keep it once; that of o_proj is the result that attention keeps."""


@dataclass(frozen=True)
class Pass:
    """Sequences that go through the model together."""

    rows: int
    length: int
    """Tokens of a row."""
    read: int = 0
    """Last positions of a row whose state is read by the last layer; 0: all."""
    masked: bool = False
    """Whether attention takes a mask of all tokens against all: packed or shared rows."""

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length

    @property
    def scored(self) -> int:
        """Positions that are read."""
        return self.rows * (self.read or self.length)

    def mask_elements(self, window: int | None) -> int:
        """Of the mask, as attention takes it; texts longer than a window have one in each layer."""
        masked = self.masked or (window is not None and window < self.length)
        return self.rows * self.length**2 * masked


@dataclass(frozen=True)
class Precision:
    """Types of a pass."""

    half: bool
    """Matrix products in 16 bits."""
    weights: int
    """Bytes of an element of the residual stream, which has the type of the frozen weights."""

    @property
    def product(self) -> int:
        """Bytes of an element of a matrix product."""
        return 2 if self.half else 4


def kept_by_layer(
    shape: ModelShape, lora: LoraSection | None, precision: Precision, step: Pass
) -> float:
    """Bytes that autograd keeps of one decoder layer until its backward pass.

    Norms keep their input in float32 and one number per token. Attention keeps queries, keys,
    values, its result and one float32 number per head. The MLP keeps both projections and the
    activation. Adapters keep their inputs, each once, and in 16 bits copies of A, B and A x.

    Args:
        lora: None where all weights train.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    size = precision.product
    numbers = 8.0 * hidden + 8 + 4 * shape.num_attention_heads
    numbers += size * (2 * shape.query_width + 2 * shape.key_width + 3 * inner)
    extra = float(size * step.mask_elements(shape.window))
    if lora is None:
        numbers += (18 if precision.half else 16) * hidden + size * inner  # norms train too
        return numbers * step.tokens + extra
    adapted = shape.adapted(lora)
    if precision.half or lora.dropout:
        numbers += size * lora.r * len(adapted)
        extra += 2.0 * precision.half * lora.r * sum(m.inputs + m.outputs for m in adapted)
    kept = {INPUT[m.name]: m.inputs for m in adapted if m.name in INPUT}
    numbers += size * sum(kept.values())
    if lora.dropout:  # a mask, and what it leaves of every input
        numbers += (1 + size) * sum(matrix.inputs for matrix in adapted)
    return numbers * step.tokens + extra


def kept_by_last_layer(
    shape: ModelShape, lora: LoraSection | None, precision: Precision, step: Pass
) -> float:
    """Bytes kept of the last layer, which computes queries and MLP only where its state is read."""
    whole = kept_by_layer(shape, lora, precision, step)
    unread = step.tokens - step.scored
    needed = 8 * shape.hidden_size
    needed += precision.product * (shape.hidden_size + 2 * shape.key_width)
    return whole * step.scored / step.tokens + float(needed * unread)


def transient_backward(
    shape: ModelShape, precision: Precision, step: Pass, recomputed: bool
) -> float:
    """Bytes of gradients inside one layer at their most, beside what is still kept.

    Args:
        recomputed: with gradient checkpointing the whole layer is kept then, else half is gone.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    if not precision.half:
        return 8.0 * inner * step.tokens
    inside = hidden + 4 * inner if recomputed else 19 * hidden
    return float(inside * step.tokens)


def transient_forward(shape: ModelShape, precision: Precision, step: Pass) -> float:
    """Bytes of a pass without gradients at their most, inside one layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    mask = float((1 + precision.product) * step.mask_elements(shape.window))
    inside = 8 * hidden + 8 * inner if precision.half else 17 * hidden + 12 * inner
    return float(inside * step.tokens) + mask


def head_chunk(shape: ModelShape, precision: Precision, scored: int, chunk: int) -> float:
    """Bytes of the logits in memory at a time: as products, in float32, and as probabilities.

    Args:
        scored: positions that go through the LM head.
        chunk: float32 logits at a time.
    """
    rows = min(scored, max(1, chunk // shape.vocab_size))
    return float(rows * shape.vocab_size * (10 if precision.half else 8))


def kv_cache(shape: ModelShape, size: int, rows: int, columns: int) -> float:
    """Bytes of keys and values of all layers.

    Args:
        size: bytes of an element.
        columns: tokens of the longest row, response included.
    """
    return float(2 * shape.num_hidden_layers * shape.key_width * rows * columns * size)


def decode_logits(shape: ModelShape, precision: Precision, rows: int) -> float:
    """Bytes of one decoding step's logits: product, float32, probabilities, sums."""
    return float(rows * shape.vocab_size * (precision.product + 4 * 4))
