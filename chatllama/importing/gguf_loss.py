"""How much of a model a GGUF file's quantisation has rounded away, as far as the file shows it."""

from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from chatllama.importing.gguf_file import GgufFile, StoredTensor

BLOCKS = {f"Q{bits}": 32 for bits in ("4_0", "4_1", "5_0", "5_1", "8_0", "4_K", "5_K")}
BLOCKS |= {f"Q{bits}_K": 16 for bits in (2, 3, 6)}
"""Weights that share a scale, for the types whose levels are evenly spaced."""
SAMPLED = 2**14
"""Weights of a tensor from which its rounding error is estimated."""


@dataclass(frozen=True)
class Loss:
    """What one type of tensor holds."""

    kind: str
    tensors: int
    share: float
    """Of the model's weights."""
    bits: float
    """Per weight, scales included."""
    error: float | None
    """Estimated root mean square of the rounding errors, in that of the weights; None: no levels
    of even spacing to tell it from, or not quantised."""

    def __str__(self) -> str:
        """One line for the terminal."""
        plural = "s" if self.tensors > 1 else ""
        about = f"{self.tensors} tensor{plural} {self.kind}: {self.share:.1%} of the weights"
        if self.error is not None:
            about += f", rounded to {self.bits:.3g} bits: errors of about {self.error:.1%}"
        return about


def losses(file: GgufFile) -> list[Loss]:
    """One entry for each type of tensor, the commonest first.

    The error of rounding to levels a step apart is uniform: step / sqrt(12).
    """
    kinds = {stored.kind for stored in file.tensors.values()}
    total = sum(prod(stored.shape) for stored in file.tensors.values())
    found = []
    for kind in kinds:
        stored = {name: each for name, each in file.tensors.items() if each.kind == kind}
        count = sum(prod(each.shape) for each in stored.values())
        bits = 8 * sum(each.size for each in stored.values()) / count
        error = _error(file, stored, BLOCKS[kind.name]) if kind.name in BLOCKS else None
        found.append(Loss(kind.name, len(stored), count / total, bits, error))
    return sorted(found, key=lambda each: -each.share)


def _error(file: GgufFile, stored: dict[str, StoredTensor], block: int) -> float:
    """Estimate over a sample of every tensor, each tensor weighted by its size."""
    squares, powers = 0.0, 0.0
    for name, each in stored.items():
        rows = max(1, SAMPLED // each.shape[-1])
        sample = file.rows(name, 0, rows).view(-1, block)
        size = prod(each.shape)
        squares += size * float(_steps(sample).square().mean()) / 12
        powers += size * float(sample.square().mean())
    return (squares / powers) ** 0.5 if powers else 0.0


def _steps(blocks: Tensor) -> Tensor:
    """(N,) smallest distance of two different values in each block (N, 16 or 32); 0: all equal."""
    gaps = blocks.sort(dim=1).values.diff(dim=1)
    smallest = torch.where(gaps > 0, gaps, inf).amin(1)
    return torch.where(smallest.isfinite(), smallest, 0)
