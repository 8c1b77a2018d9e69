"""GPUs by name, from their makers' data sheets; sizes of memory as people write them."""

import re
from dataclasses import dataclass

GB = 1e9
OVERHEAD = 0.8 * GB
"""CUDA context, libraries and their workspaces on a GPU; assumed, not measured."""
TIGHT = 0.95
"""Share of the memory above which the allocator's gaps may decide."""


@dataclass(frozen=True)
class Gpu:
    """What the maker says of one GPU."""

    memory: float
    """Bytes; a GB counts as 1e9, since the driver and others take the rest."""
    bandwidth: float
    """Bytes per second."""
    flops: float
    """Dense bfloat16 operations per second, two for each multiplication and addition."""


GPUS: dict[str, Gpu] = {
    "rtx3090": Gpu(24 * GB, 936e9, 71e12),
    "rtx4090": Gpu(24 * GB, 1008e9, 165e12),
    "a10": Gpu(24 * GB, 600e9, 125e12),
    "l40s": Gpu(48 * GB, 864e9, 362e12),
    "a100-40gb": Gpu(40 * GB, 1555e9, 312e12),
    "a100": Gpu(80 * GB, 2039e9, 312e12),
    "h100": Gpu(80 * GB, 3350e9, 989e12),
    "h200": Gpu(141 * GB, 4800e9, 989e12),
    "b200": Gpu(180 * GB, 8000e9, 2250e12),
}
_UNITS = {"": GB, "g": GB, "gb": GB, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20}


def parse_memory(text: str) -> float:
    """Bytes of `80GB`, `80 GiB` or `80`.

    Raises:
        ValueError: it is no such size, or none above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"--gpu-memory {text!r}: give a size such as 24GB or 80GiB")
    return float(match[1]) * _UNITS[match[2]]


def gpu_key(name: str) -> str:
    """A GPU's name as a key of `GPUS`."""
    return name.lower().replace(" ", "")


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in any case; ValueError lists the names."""
    gpu = GPUS.get(gpu_key(name))
    if gpu is None:
        raise ValueError(f"--gpu {name!r} is not known here; known are {', '.join(GPUS)}")
    return gpu


def gigabytes(size: float) -> str:
    """`13.5 GB`, `0.64 GB`, `52.4 MB`, `3.1 kB`."""
    for unit, value in (("GB", size / GB), ("MB", size / 1e6)):
        if value >= 0.1:
            return f"{value:.{1 if value >= 10 else 2}f} {unit}"
    return f"{size / 1e3:.1f} kB"
