"""What a GPU would be given to do, counted on tensors without numbers: kernels and waits.

For code on fake CPU tensors (under `FakeTensorMode`, with autocast) or on meta tensors, which stand
for a device's. Functions that are one kernel on CUDA and several on the CPU count as one.
"""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL = ALLOCATIONS | {"_unsafe_view", "detach", "lift_fresh", "_local_scalar_dense"}
READS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__}
READS |= {Tensor.__float__, Tensor.__index__}


def llama_7b(num_layers: int) -> LlamaForCausalLM:
    """LLaMA-2-7B's layers, some of its 32, in bfloat16 on meta: no memory, no numbers."""
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
    }
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=num_layers, **sizes)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    nn.Module.to(llama, torch.bfloat16)
    return llama.eval().requires_grad_(False)


def made_fake(model: nn.Module) -> None:
    """Under `FakeTensorMode`, puts fake CPU tensors in the place of a model's parameters."""
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                module._parameters[name] = made.setdefault(id(old), new)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)


class KernelCounts:
    """Counts what happens inside `with`: `kernels` and `syncs`, by name.

    A read gives zeros; a shape that depends on numbers (`nonzero`, a mask as an index) fails, as
    torch does without numbers. A copy from the CPU to meta waits unless it is asked not to.
    """

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> "KernelCounts":
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Kernels(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class _Kernels(TorchDispatchMode):
    def __init__(self, counts: KernelCounts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        result = func(*args, **kwargs)
        found = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        if name in ("_to_copy", "copy_") and found == {"cpu", "meta"}:
            if not (kwargs.get("non_blocking") or True in args[2:]):
                self._counts.syncs[name] += 1
        elif not (_is_view(func) or name in NO_KERNEL or name.startswith("prim::")):
            self._counts.kernels[name] += 1
        return result


def _is_view(func: Any) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


class _Functions(TorchFunctionMode):
    def __init__(self, counts: KernelCounts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS and (args[0].device.type == "meta" or _is_fake(args[0])):
            self._counts.syncs[func.__name__] += 1
            return _zeros(func, args[0])
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self._counts.syncs["tensor"] += 1
        if func is functional.scaled_dot_product_attention:
            self._counts.kernels["attention"] += 1
            return torch.empty_like(args[0])
        if func in (functional.rms_norm, torch.rms_norm):
            self._counts.kernels["rms_norm"] += 1
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"


def _zeros(func: Any, tensor: Tensor) -> Any:
    zeros = np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if func is Tensor.cpu:
        return torch.from_numpy(zeros)
    return zeros if func is Tensor.numpy else getattr(zeros, func.__name__)()
