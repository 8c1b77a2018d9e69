"""What DeepSpeed's ZeRO stages make of trained parameters, and what ZeRO-3 fetches of the others.

Float32 throughout: trained weights, gradients, AdamW's two moments. A test on two ranks compares
with what DeepSpeed allocates.
"""

from chatllama.config.schema import DeepSpeedSection
from chatllama.planning.shape import ModelShape

BUCKET_ELEMENTS = 50_000_000
"""Most gradients that are reduced together; fewer where less is trained."""
LIVE_ELEMENTS = 1_000_000_000
"""ZeRO-3: parameters that DeepSpeed keeps gathered for their next use."""
PREFETCHED_ELEMENTS = 50_000_000
"""ZeRO-3: parameters that are fetched together."""


def resident_state(zero: DeepSpeedSection, elements: int, ranks: int) -> dict[str, float]:
    """Bytes on one rank, beside their weights, of trained parameters between steps.

    Args:
        zero: stage 0 stands for a process without the launcher too.
        elements: of the trained parameters.
    """
    if zero.stage == 0:
        return {"AdamW": 8.0 * elements}
    share = elements / ranks
    state = {"AdamW": 8 * share, "optimizer's own copy": 4 * share}
    if zero.offload_optimizer != "none":
        state = dict.fromkeys(state, 0.0)
    if zero.stage == 3:
        return state | {"gradients": 4 * share}
    return state | {"gradients of the last step": 4.0 * elements}


def step_state(zero: DeepSpeedSection, elements: int, ranks: int, adapter: bool) -> float:
    """Bytes on one rank of gradients that a step adds; arguments as of `resident_state`.

    Args:
        adapter: gradients of adapters lie whole on every rank until they are reduced, once a step;
            those of whole models are reduced at every microbatch.
    """
    if adapter or zero.stage == 0:
        return 4.0 * elements
    return 0.0 if zero.stage == 3 else 4.0 * elements / ranks


def bucket_bytes(elements: int) -> float:
    """Bytes of the buffer that gradients are reduced through; ZeRO-3 keeps it between steps.

    Args:
        elements: of all trained parameters of the stage.
    """
    return 4.0 * min(elements, BUCKET_ELEMENTS)


def gathered_bytes(shape: ModelShape, size: int) -> float:
    """Bytes of the frozen weights that ZeRO-3 holds whole at a time, on every rank.

    Args:
        size: bytes of an element.
    """
    layer = (shape.linear_parameters + shape.vector_parameters) / shape.num_hidden_layers
    fetched = min(shape.parameters, PREFETCHED_ELEMENTS)  # as they come, and then in their places
    return float(size * (min(shape.parameters, LIVE_ELEMENTS + layer) + fetched))
