"""The hardware that a job runs on, as lineage.json keeps it."""

import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def driver() -> str:
    """Version of NVIDIA's driver, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (nvidia-smi is missing)"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def machines_of_job() -> list[dict[str, Any]]:
    """The machines of this job, each with its ranks and the GPUs that they use.

    Every rank must call. Host names stay out: reports are shown to others.
    """
    from chatllama.runtime.distributed import all_gather_objects

    machines: dict[str, dict[str, Any]] = {}
    for host, machine, gpu in all_gather_objects((socket.gethostname(), _machine(), _gpu())):
        kept = machines.setdefault(host, {**machine, "ranks": 0, "gpus": {}})
        kept["ranks"] += 1
        if gpu is not None:
            kept["gpus"][gpu] = kept["gpus"].get(gpu, 0) + 1
    return list(machines.values())


def _machine() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": count_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    if torch.cuda.is_available():
        found |= {"driver": driver(), "cuda": torch.version.cuda}
    return found


def _gpu() -> str | None:
    """Name and memory of this rank's GPU."""
    import torch

    from chatllama.runtime.distributed import device

    if device().type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device())
    return f"{about.name}, {about.total_memory / 1e9:.0f} GB"


def _cpu() -> str:
    """The CPU's name, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"
