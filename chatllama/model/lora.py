"""LoRA layers that multiply once where that is cheaper: the adapter is added to the weight first.

PEFT computes x W' + (x A') B' scale: two thin products and three passes over the output beside the
large product, and as much again backward. Over many tokens W + scale B A is cheaper. It lives for
one product only (backward makes it again), so no second copy of the weights is held.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from chatllama.runtime.distributed import call_inside
from chatllama.runtime.products import is_plain, product


class _MergedProduct(torch.autograd.Function):
    """x (W + scale B A)', with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return product(x, torch.addmm(weight, up, down, alpha=scale).T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        slope = gradients[0].flatten(0, -2)
        inputs = x.flatten(0, -2)
        to_x = to_down = to_up = None
        if ctx.needs_input_grad[0]:
            merged = torch.addmm(weight, up, down, alpha=ctx.scale)
            to_x = product(slope, merged).view(x.shape)
        if ctx.needs_input_grad[2]:
            to_down = product((slope @ up).mul_(ctx.scale).T, inputs)
            to_up = slope.T @ (inputs @ down.T).mul_(ctx.scale)
        return to_x, None, to_down, to_up, None


class MergingLinear(lora.Linear):
    """PEFT's layer; with `merges`, the other order of products for many float32 rows."""

    merges = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), as PEFT's layer but for rounding."""
        if not self.merges or args or kwargs or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        name = self._active_adapter[0]
        if name not in self.lora_A or not self._pays(x, name):
            return super().forward(x)
        modules = (self.base_layer, self.lora_A[name], self.lora_B[name])
        base, down, up = cast(tuple[nn.Linear, nn.Linear, nn.Linear], modules)

        def product(x: Tensor) -> Tensor:
            # Views give the two gradients a fixed order in backward, on which ZeRO-2 relies: it
            # must be the same on all ranks.
            views = (part.weight.view_as(part.weight) for part in (down, up))
            result = _MergedProduct.apply(x, base.weight, *views, self.scaling[name])
            return result if base.bias is None else result + base.bias

        split = hasattr(base.weight, "ds_id")
        return call_inside([base, down, up] if split else [], product, x)

    def _pays(self, x: Tensor, name: str) -> bool:
        """Whether the shortcut is exact but for rounding, and not slower.

        Sums in bfloat16 would round the adapter away. Under ZeRO-3 all ranks must decide alike,
        whatever the number of their rows.
        """
        base = cast(nn.Linear, self.base_layer)
        exact = base.weight.dtype == x.dtype == torch.float32
        if not exact or torch.is_autocast_enabled(x.device.type):
            return False
        if not isinstance(self.lora_dropout[name], nn.Identity):
            return False
        if hasattr(base.weight, "ds_id"):
            return self.training
        rows = x.numel() // x.shape[-1]
        return rows * (base.in_features + base.out_features) > base.in_features * base.out_features


def merge_products(model: nn.Module) -> None:
    """Makes a model's layers faster for training; they may round otherwise than PEFT's."""
    for layer in model.modules():
        if isinstance(layer, MergingLinear):
            layer.merges = True


def check_targets(llama: nn.Module, targets: Literal["all-linear"] | Sequence[str]) -> None:
    """Raises ValueError for a name of `lora.target_modules` that is no linear layer of the blocks.

    PEFT passes over names that match nothing where others do, and the LM head is read without its
    adapter.
    """
    if targets == "all-linear":
        return
    modules = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in modules if name.startswith("model.layers.")]
    if wrong := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in linear)]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(
            f"lora.target_modules: {', '.join(map(repr, wrong))} names no linear layer of the "
            f"backbone's blocks; these have {known}. `target_modules: all-linear` (no list) takes "
            "them all"
        )


def make_layer(target: nn.Module, adapter_name: str, **settings: Any) -> nn.Module | None:
    """For PEFT: the layer of a plain matrix's first adapter; quantised ones keep PEFT's own."""
    return MergingLinear(target, adapter_name, **settings) if is_plain(target) else None
