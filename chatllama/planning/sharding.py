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


def trained_state(zero: DeepSpeedSection, elements: int, ranks: int) -> dict[str, float]:
    """Bytes on one rank of what training some parameters takes beside their weights.

    Args:
        zero: None of it applies without the launcher: pass stage 0.
        elements: of the trained parameters.
    """
    away = zero.offload_optimizer != "none"
    share = elements / ranks
    if zero.stage == 0:
        return {"gradients": 4.0 * elements, "AdamW": 8.0 * elements}
    if zero.stage == 3:
        state = {"gradients": 4 * share, "AdamW": 8 * share, "optimizer's own copy": 4 * share}
    else:
        # Stages 1 and 2 reduce into shards, but keep a rank's gradients for the next step's.
        state = {
            "gradients": 4.0 * elements + 4 * share,
            "AdamW": 8 * share,
            "optimizer's own copy": 4 * share,
        }
    return {name: 0.0 if away and name != "gradients" else size for name, size in state.items()}


def bucket_bytes(zero: DeepSpeedSection, elements: int) -> float:
    """Bytes of the buffer that gradients are reduced through.

    Args:
        elements: of all trained parameters of the stage.
    """
    return 4.0 * min(elements, BUCKET_ELEMENTS) if zero.stage else 0.0


def gathered_bytes(shape: ModelShape, size: int) -> float:
    """Bytes of the frozen weights that ZeRO-3 holds whole at a time, on every rank.

    Args:
        size: bytes of an element.
    """
    layer = (shape.linear_parameters + shape.vector_parameters) / shape.num_hidden_layers
    return float(size * min(shape.parameters, LIVE_ELEMENTS + layer))
