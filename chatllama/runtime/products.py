"""Float32 matrix products on the CPU, with oneDNN where MKL leaves half of a processor unused.

torch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors alone. oneDNN
is part of torch too and takes it everywhere: on an AMD EPYC it needs 60 % of MKL's time for one row
and 45 % for many (`benchmarks/results/2026-12-01-thin-layers.md`). torch offers it to its compiler
only, by `mkldnn._linear_pointwise`, without gradients. Sums round otherwise, as on another machine.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_FLAGS = Path("/proc/cpuinfo")
OPERATION = "_linear_pointwise"
"""Of `torch.ops.mkldnn`; not public, so a later torch may lack it and multiplies as it does."""
SMALLEST = 2**16
"""Elements of the second matrix below which starting oneDNN takes longer than the product."""


@lru_cache
def prefers_onednn() -> bool:
    """Whether this is an x86 processor with AVX-512 that is not Intel's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPU_FLAGS.is_file():
        return False
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, OPERATION)
    return known and "GenuineIntel" not in CPU_FLAGS.read_text(errors="replace")


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product without gradient: (..., O).

    Which library computes it depends on type and size of `right` and on nothing else: a text's
    numbers with and without gradient are the same.

    Args:
        left: (..., I) float.
        right: (I, O) of the same type.
    """
    if _suits(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return left @ right


def _suits(left: Tensor, right: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: the rest is not for a compiler
        and left.dtype == right.dtype == torch.float32
        and right.numel() >= SMALLEST
        and right.device.type == "cpu"
        and prefers_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


class _Product(torch.autograd.Function):
    """x W', with gradients for x and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> Any:
        weight, x = ctx.saved_tensors
        to_x = product(gradients[0], weight) if ctx.needs_input_grad[0] else None
        if x is None:
            return to_x, None
        return to_x, product(gradients[0].flatten(0, -2).T, x.flatten(0, -2))


class OneDnnLinear(nn.Linear):
    """A matrix that is multiplied by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, but for rounding."""
        if not _suits(input, self.weight):
            return super().forward(input)
        if torch.is_grad_enabled():
            result = cast(Tensor, _Product.apply(input, self.weight))
        else:
            result = product(input, self.weight.T)
        return result if self.bias is None else result + self.bias


def use_onednn(model: nn.Module) -> None:
    """Lets oneDNN multiply by a model's large float32 matrices, where this machine prefers it."""
    for module in model.modules() if prefers_onednn() else []:
        if type(module) is nn.Linear and module.weight.numel() >= SMALLEST:
            module.__class__ = OneDnnLinear


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer of one matrix, neither quantised nor adapted."""
    return type(module) in (nn.Linear, OneDnnLinear)
