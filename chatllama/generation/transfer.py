"""Copies of small host tensors to the model's device; nothing here waits for it."""

from collections.abc import Sequence

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The CPU tensor on the device.

    From pinned memory the copy is queued behind the kernels that were launched before it. An
    ordinary one, such as that of `torch.tensor(..., device=...)`, waits for all of them.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def upload_ids(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Whole numbers on the device: (N,) int64."""
    return upload(torch.tensor(list(numbers), dtype=torch.long), device)
