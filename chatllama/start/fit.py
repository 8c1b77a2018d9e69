"""Settings with which a config fits a GPU: `chatllama plan --suggest` for `init`."""

from collections.abc import Callable, Mapping

from chatllama.config.schema import Config
from chatllama.planning.hardware import parse_memory
from chatllama.planning.memory import Place
from chatllama.planning.source import find_shape
from chatllama.planning.verdict import suggest
from chatllama.runtime.distributed import device


def gpu_fit(memory: str | None) -> Callable[[Config], Mapping[str, object] | None] | None:
    """What finds the settings for a GPU of this memory, or for this machine's; None: a CPU.

    Args:
        memory: such as 24GB; `none` for the CPU; None for the GPU of this machine, if it has one.

    Raises:
        ValueError: no such size.
    """
    if memory == "none" or (memory is None and device().type == "cpu"):
        return None
    if memory is not None:
        size = parse_memory(memory)
    else:
        import torch

        size = float(torch.cuda.get_device_properties(device()).total_memory)
    place = Place(1, True, "cuda")
    return lambda cfg: suggest(cfg, find_shape(cfg)[0], place, size)
