"""ZeRO's settings, and whether a model sharded by ZeRO-3 fits whole on every rank for a while.

It neither imports deepspeed nor moves tensors.
"""

from typing import Any, cast

import torch
from torch import nn

from chatllama.config.schema import DeepSpeedSection
from chatllama.planning.sharding import BUCKET_ELEMENTS
from chatllama.runtime.distributed import all_max, device, free_memory, rank, world_size

MEMORY_FRACTION = 0.8
"""Share of the free memory that weights may take; the rest is for the KV cache."""


def zero_settings(
    section: DeepSpeedSection,
    *,
    accumulation_steps: int,
    max_grad_norm: float,
    num_trained: int = BUCKET_ELEMENTS,
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        accumulation_steps: backward passes per optimizer step.
        max_grad_norm: global norm over all ranks.
        num_trained: elements of all trained parameters.

    Raises:
        ValueError: DeepSpeed would silently train wrongly.
    """
    if section.offload_optimizer == "nvme" and device().type == "cpu":
        raise ValueError(
            "deepspeed.offload_optimizer nvme works with GPUs only: on the CPU DeepSpeed swaps "
            "out gradients that are not the model's, and training silently goes wrong. Use cpu or "
            "none"
        )
    # Allocated in full; DeepSpeed's default of 5e8 elements would take 2 GB on every GPU.
    bucket = min(num_trained, BUCKET_ELEMENTS)
    zero: dict[str, Any] = {"stage": section.stage, "reduce_bucket_size": bucket}
    if section.stage == 3:
        zero["stage3_param_persistence_threshold"] = section.stage3_param_persistence_threshold
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    for key in ("offload_optimizer", "offload_param"):
        place = getattr(section, key)
        if place != "none":
            zero[key] = {"device": place, "pin_memory": device().type == "cuda"}
        if place == "nvme":
            zero[key]["nvme_path"] = section.nvme_path
    return {
        "train_batch_size": accumulation_steps * world_size(),
        "train_micro_batch_size_per_gpu": 1,  # in microbatches: DeepSpeed only checks the product
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def remove_hooks(offload: Any) -> None:
    """Modules neither fetch their weights nor release them from here on."""
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def add_hooks(offload: Any) -> None:
    """Modules do so again, in an order that DeepSpeed has yet to learn."""
    coordinator = offload.param_coordinator
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def absent_bytes(model: nn.Module) -> int:
    """Bytes of this rank's memory that gathering all parameters takes; 0 if none is sharded."""
    parameters = cast(list[Any], list(model.parameters()))
    absent = (p for p in parameters if hasattr(p, "ds_numel") and p.numel() != p.ds_numel)
    return sum(p.ds_numel * p.element_size() for p in absent)


def whole_model_fits(model: nn.Module) -> bool:
    """Whether the rank with the least free memory can hold all parameters; equal on all ranks.

    If not, rank 0 prints a warning with the figures and the remedies.
    """
    need, free = absent_bytes(model), free_memory()
    worst = all_max(torch.tensor([need / max(free, 1), -free], dtype=torch.float64).to(device()))
    if float(worst[0]) <= MEMORY_FRACTION:
        return True
    if rank() == 0:
        print(
            f"warning: the whole model takes {_gib(need)} and a rank has {_gib(-float(worst[1]))} "
            "free: rollouts will fetch the weights layer by layer for every token, which is many "
            "times slower. More memory: fewer or smaller adapters, backbone.dtype bfloat16, a "
            "smaller generation.batch_size; or deepspeed.gather_for_rollouts=true to try it anyway",
            flush=True,
        )
    return False


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
