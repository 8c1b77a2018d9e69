"""How our processes use CUDA: its memory pool and its kernels. Nothing here touches a GPU."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

POOL_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Torch's name for the pool's settings, and its older one."""


def has_gpu_driver() -> bool:
    """Whether torch could find a GPU: CUDA's driver, or the device of ROCm's, is here."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True


def let_memory_grow() -> None:
    """Lets CUDA's memory pool grow in place; sequences of all lengths would cut it into pieces.

    What the user has set stays. Must come before torch is imported.
    """
    if not any(name in os.environ for name in POOL_VARIABLES):
        os.environ[POOL_VARIABLES[0]] = "expandable_segments:True"


def choose_kernels(deterministic: bool | None = None) -> None:
    """Leaves cuDNN's attention out, for the whole process; before anything runs on the GPU.

    It comes first on Hopper, builds a plan of tens of milliseconds for every new shape, and may
    take another plan with gradient than without: the first probability ratios would not be 1.

    Args:
        deterministic: only kernels that repeat bit for bit, also in the backward pass. None: as
            the process has it.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS repeats with its own workspace
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by transformers
    if deterministic is not None:
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def any_kernels() -> Iterator[None]:
    """Kernels that torch does not call deterministic are allowed inside.

    Such is the running sum of probabilities on CUDA, which sampling needs.
    """
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
