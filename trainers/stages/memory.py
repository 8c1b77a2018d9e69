"""A stage's plan against what it took: printed at its start and end, and when memory runs out."""

import resource
from collections.abc import Iterator

import torch

from chatllama.config.schema import Config
from chatllama.planning.hardware import gigabytes
from chatllama.planning.memory import Place, StageMemory, plan_memory
from chatllama.planning.shape import ModelShape
from chatllama.planning.source import find_shape
from chatllama.planning.verdict import judge, remedies
from chatllama.runs.folder import Stage
from chatllama.runtime.distributed import all_max, device, is_launched, world_size


def here() -> Place:
    """What this process's rank runs on."""
    kind = "cuda" if device().type == "cuda" else "cpu"
    return Place(world_size(), is_launched(), kind)


def announcement(cfg: Config, stage: Stage) -> Iterator[str]:
    """The plan of a stage in one line, with a verdict on a GPU; why there is none, else."""
    try:
        shape, _ = find_shape(cfg)
    except ValueError as error:
        yield f"memory: no plan ({error})"
        return
    plan = plan_memory(cfg, shape, here(), stage)
    text = f"memory: planned {_summary(plan)}"
    if device().type == "cuda":
        total = torch.cuda.get_device_properties(device()).total_memory
        text += f"; this GPU has {gigabytes(total)}: {judge(plan.peak, total)}"
    yield text


def _summary(plan: StageMemory) -> str:
    phases = ", ".join(f"{name} {gigabytes(peak)}" for name, peak in plan.peaks.items())
    return (
        f"{gigabytes(plan.peak)} of tensors a rank at full length, {gigabytes(plan.held)} of them "
        f"always ({phases})"
    )


def peak_here() -> int:
    """The most bytes this process has held: tensors of its GPU, or all of its memory on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated(device())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def actual(cfg: Config, stage: Stage) -> str:
    """What the rank that took most has taken, beside the plan; every rank must call."""
    most = all_max(torch.tensor(float(peak_here()), dtype=torch.float64, device=device()))
    what = "of tensors on a GPU" if device().type == "cuda" else "resident, libraries included"
    text = f"memory: at most {gigabytes(float(most))} {what}"
    try:
        shape, _ = find_shape(cfg)
    except ValueError:  # said at the start
        return text
    return f"{text}; planned {gigabytes(plan_memory(cfg, shape, here(), stage).peak)} of tensors"


def out_of_memory(cfg: Config, stage: Stage, reason: str) -> str:
    """An error message: the plan, and the keys that lower it, the cheapest first."""
    text = f"memory ran out in stage {stage} ({reason}). "
    try:
        shape, _ = find_shape(cfg)
    except ValueError as error:
        return f"{text}There is no plan for this model ({error})"
    plan = plan_memory(cfg, shape, here(), stage)
    return f"{text}Planned were {_summary(plan)}. {_keys(cfg, shape, stage)}"


def _keys(cfg: Config, shape: ModelShape, stage: Stage) -> str:
    found = [
        f"{each.key}={str(each.value).lower()} ({each.phase}: {gigabytes(each.lowered)})"
        for each in remedies(cfg, shape, here(), stage)
    ]
    if not found:
        return "No key of the config lowers it: shorten the sequences, or take a larger GPU"
    return f"Less is taken with {', or '.join(found)}"
