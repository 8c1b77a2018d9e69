"""The start of a process under DeepSpeed: it joins the others, and loads its part of a model.

Training is in `engine.py`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from chatllama.config.schema import DeepSpeedSection
from chatllama.runtime.distributed import (
    barrier,
    device,
    is_launched,
    open_groups,
    rank,
    wait_limit,
    world_size,
)
from trainers.engine.zero import zero_settings


def initialise(section: DeepSpeedSection) -> None:
    """Joins the other ranks; must come before any model is made. Without a launcher a no-op."""
    if not is_launched():
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    open_groups(section.timeout_minutes)
    barrier()  # from here on the end of a rank is noticed at once
    if device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns of the missing GPU
    import deepspeed

    # The shared-memory op needs a C++ compiler and 40 s at first use; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)  # takes the group that is open
    # DeepSpeed's own copy of the group would have torch's default limit.
    groups = deepspeed.utils.groups
    groups._WORLD_GROUP = torch.distributed.new_group(timeout=wait_limit())
    assert torch.distributed.get_world_size() == world_size()
    if rank() == 0 and "DEEPSPEED_TIMEOUT" in os.environ:
        print(
            "warning: DEEPSPEED_TIMEOUT has no effect here; deepspeed.timeout_minutes is "
            f"{section.timeout_minutes:g}",
            file=sys.stderr,
        )


@contextmanager
def gpu_as_local_rank() -> Iterator[None]:
    """LOCAL_RANK is the number of this process's GPU inside: DeepSpeed takes one for the other.

    They differ where every process sees its own GPU alone.
    """
    before, place = os.environ["LOCAL_RANK"], device()
    if place.index is not None:
        os.environ["LOCAL_RANK"] = str(place.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


@contextmanager
def partitioned_loading(section: DeepSpeedSection, dtype: str) -> Iterator[None]:
    """Under ZeRO-3, models loaded inside are sharded over the ranks as they are read.

    Args:
        dtype: of the weights, `float32` or `bfloat16`.
    """
    if not (is_launched() and section.stage == 3):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = zero_settings(section, accumulation_steps=1, max_grad_norm=1.0)
    settings["bf16"] = {"enabled": dtype == "bfloat16"}  # else zero.Init makes float32 of all
    keep = HfDeepSpeedConfig(settings)
    try:
        with gpu_as_local_rank():
            yield
    finally:
        del keep
        unset_hf_deepspeed_config()
