"""The layers with which a 16-bit model samples: few kernels for one token of each row.

With one token a row a GPU waits for the next kernel, whatever it computes. Here an adapter is a
copy in the backbone's type, not cast at every step; matrices A that read the same input are one;
and a norm is one kernel. They round otherwise than the layers of training, which score the tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chatllama.model.families import family_class
from chatllama.model.lm_head import float32_logits
from chatllama.runtime.products import is_plain

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of a decoder layer that read one tensor."""


class _Norm(nn.Module):
    """The norm, on CUDA in one kernel. Without autocast, which would make it float32."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class _Down(nn.Module):
    """x A' for all adapters that read x, whose matrices A stand one below the other.

    The product is made for the first that asks and kept until the last has it.
    """

    def __init__(self, downs: Sequence[Tensor], kind: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.cat(list(downs)).detach().to(kind), persistent=False)
        self._num_users, self._left = len(downs), 0
        self._input: Tensor | None = None
        self._product: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self._product
        if x is not self._input or product is None:
            product = functional.linear(x, self.weight)
            self._left = self._num_users
        self._left -= 1
        waits = self._left > 0
        self._input, self._product = (x, product) if waits else (None, None)
        return product


class _Projection(nn.Module):
    """A matrix and its adapter."""

    def __init__(self, base: nn.Module, down: _Down, start: int, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down = base, down
        self.up = nn.Buffer(up.detach().to(down.weight.dtype), persistent=False)
        self._columns = slice(start, start + up.shape[1])
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        product = self.down(x)[..., self._columns].flatten(0, -2)
        result.view(-1, result.shape[-1]).addmm_(product, self.up.T, alpha=self._scale)
        return result


class SamplingLayers:
    """What stands in for a model's layers while one adapter samples.

    Their memory stays where it is, so that a compiled step finds it there. The last norm keeps its
    own, since ZeRO-3 fetches what is outside of decoder layers by the modules that it knows.

    Args:
        llama: with its adapters in place, in bfloat16 or float16; the adapter whole on this device.
        adapter: PEFT's name; None: no adapter.
    """

    def __init__(self, llama: LlamaForCausalLM, adapter: str | None) -> None:
        self._kind, self._adapter = llama.dtype, adapter or ""
        self._copies: list[tuple[Tensor, Sequence[Tensor]]] = []
        """Tensors and the float32 ones that they are copies of, one below the other."""
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        norm = family_class(llama.config, "RMSNorm")
        for parent in list(llama.model.layers.modules()):
            if isinstance(parent, LoraLayer):
                continue
            for name, child in parent.named_children():
                if type(child) is norm and "forward" not in vars(child):  # not Liger's
                    self._places.append((parent, name, _Norm(cast(LlamaRMSNorm, child))))
            layers = {n: c for n, c in parent.named_children() if isinstance(c, LoraLayer)}
            for group in [*SAME_INPUT, *((name,) for name in layers)]:
                own = {name: layers.pop(name) for name in group if name in layers}
                self._add(parent, own)

    def _add(self, parent: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
        """Adds a parent's adapted matrices, all of which read the same input."""
        adapter = self._adapter
        adapted = [layer for layer in layers.values() if adapter in layer.lora_A]
        downs = [cast(nn.Linear, layer.lora_A[adapter]).weight for layer in adapted]
        down, start = _Down(downs, self._kind) if downs else None, 0
        if down is not None:
            self._copies.append((down.weight, downs))
        for name, layer in layers.items():
            base = layer.get_base_layer()
            if down is None or layer not in adapted:
                self._places.append((parent, name, base))
                continue
            up = cast(nn.Linear, layer.lora_B[adapter]).weight
            made = _Projection(base, down, start, up, layer.scaling[adapter])
            start += up.shape[1]
            self._copies.append((made.up, [up]))
            self._places.append((parent, name, made))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the adapter again."""
        for copy, sources in self._copies:
            start = 0
            for source in sources:
                copy[start : start + len(source)] = source
                start += len(source)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with these layers inside."""
        before = [parent._modules[name] for parent, name, _ in self._places]
        try:
            for parent, name, made in self._places:
                parent._modules[name] = made
            yield
        finally:
            for (parent, name, _), old in zip(self._places, before, strict=True):
                parent._modules[name] = old


@contextmanager
def float32_head(llama: LlamaForCausalLM) -> Iterator[None]:
    """The LM head gives float32 sums of its products inside, not sums rounded to 16 bits."""
    head = llama.lm_head
    if not is_plain(head) or "forward" in vars(head):
        yield
        return
    vars(head)["forward"] = lambda hidden: float32_logits(hidden, head.weight)
    try:
        yield
    finally:
        del vars(head)["forward"]
