"""Bytes of tensors at their most, of fake tensors or of real ones."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryRecord(TorchDispatchMode):
    """While entered: the bytes of all tensor storages that are alive, as the operators make them.

    Memory that an operator takes and gives back within itself (cuBLAS's workspace) is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.held = self.most = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self.note(tensor)

    def note(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage from now on, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.held += self._sizes[key]
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def restart(self) -> int:
        """Begins a new search for the most; returns the bytes held now."""
        self.most = self.held
        return self.held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reads = func is torch.ops.aten._local_scalar_dense.default
        if reads and type(args[0]) is not torch.Tensor:  # a fake number: any will do
            return 1.0 if args[0].is_floating_point() else True
        if func is torch.ops.aten.index.Tensor and any(map(_is_mask, args[1])):
            # A fake tensor cannot be asked how many elements a mask leaves.
            args = (args[0], [i for index in args[1] for i in _numbers(index)])
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return result


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _numbers(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as an index for each of its dimensions; other indices as they are."""
    if index is None or not _is_mask(index):
        return [index]
    return list(index.nonzero(as_tuple=True))


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
