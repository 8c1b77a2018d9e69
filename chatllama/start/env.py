"""`chatllama env`: what a bug report needs about this machine, and what is missing on it."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from chatllama import __version__
from chatllama.runtime.machine import count_cores, driver

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "trl", "datasets", "accelerate",
            "tokenizers", "huggingface_hub")  # fmt: skip
EXTRAS = {
    "bitsandbytes": "int8 and nf4 (extra bitsandbytes)",
    "flash_attn": "attn_implementation flash_attention_2",
    "liger_kernel": "backbone.liger_kernel (extra liger)",
    "gguf": "GGUF files (extra gguf)",
    "wandb": "tracking.report_to wandb (extra wandb)",
    "vllm": "servers (extra vllm)",
}
LEAST_DISK = 20e9
"""Bytes below which a 7B model does not fit beside its checkpoints."""


def env_lines() -> Iterator[str]:
    """The report, a line for each thing; nothing is downloaded or sent."""
    yield f"chatllama    {__version__}{_commit()}"
    yield f"python       {platform.python_version()} ({sys.executable})"
    yield f"system       {platform.platform()}"
    memory = psutil.virtual_memory()
    free = f"{_gb(memory.available)} of {_gb(memory.total)} free"
    yield f"cpu          {count_cores()} cores, memory {free}"
    for name, folder in _folders().items():
        yield _disk_line(name, folder)
    yield from _torch_lines()
    for tool, use in (("g++", "DeepSpeed's operators, compile"), ("nvcc", "building flash-attn"),
                      ("pdsh", "several machines from one command")):  # fmt: skip
        yield _line(tool, shutil.which(tool), f"not found; needed for {use}")
    yield f"packages     {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}"
    for name, use in EXTRAS.items():
        found = find_spec(name) is not None
        yield _line(name, _version(name.replace("_", "-")) if found else None, f"no: {use}")
    yield from _hub_lines()


def _torch_lines() -> Iterator[str]:
    """CUDA, driver and GPUs, with what their kernels can do."""
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else (
            f"torch is built for CUDA {torch.version.cuda}, and finds no driver or no GPU"
        )  # fmt: skip
        yield f"gpu          none: {reason}"
        yield "attention    sdpa"
        return
    yield f"cuda         {torch.version.cuda}, driver {driver()}"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        about = torch.cuda.get_device_properties(index)
        yield (
            f"gpu {index}        {about.name}, sm_{about.major}{about.minor}, memory "
            f"{_gb(free)} of {_gb(total)} free"
        )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield f"bfloat16     {'yes' if bf16 else 'no: set backbone.dtype: float32'}"
    kernels = ["sdpa", *(["varlen"] if bf16 else [])]
    yield f"attention    {', '.join(kernels)}"


def _hub_lines() -> Iterator[str]:
    """Whether gated models can be had."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield "hub          offline (HF_HUB_OFFLINE): only what is in the cache"
    elif get_token() is None:
        yield "hub          no token: gated models need `hf auth login`"
    else:
        yield "hub          a token is set (not shown, not tried)"


def _folders() -> dict[str, Path]:
    from huggingface_hub import constants

    return {"disk": Path.cwd(), "hub cache": Path(constants.HF_HUB_CACHE)}


def _disk_line(name: str, folder: Path) -> str:
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(place).free
    little = "; little for checkpoints and models" if free < LEAST_DISK else ""
    return f"{name:<12} {_gb(free)} free at {folder}{little}"


def _commit() -> str:
    """` (commit abc, changed)` of a checkout, or nothing."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" (commit {done.stdout.strip()})" if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _line(name: str, found: str | None, otherwise: str) -> str:
    return f"{name:<12} {found or otherwise}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
