"""A loss or gradient norm that is NaN or infinite ends a stage; the batch is kept for the user.

PPO's rules for it are in `trainers/ppo/health`; what reaches a checkpoint is checked by the engine.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from chatllama.runs.folder import RunFolder, Stage, step_folders
from chatllama.runtime.distributed import barrier, rank

Batch = Mapping[str, torch.Tensor]


def check_finite(
    run: RunFolder,
    stage: Stage,
    key: str,
    step: int,
    metrics: Mapping[str, float],
    batch: Callable[[], Batch],
    begun: int = 0,
) -> None:
    """Raises ValueError if a metric of a step is not finite; every rank must call.

    Args:
        run: gets `bad_batch-step-N.pt` in the stage's folder.
        stage: whose checkpoints are named.
        key: the section of the config that holds the learning rate.
        step: optimizer steps done.
        metrics: identical on all ranks.
        batch: makes the step's batch, for the file.
        begun: steps done before this start.
    """
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if not bad:
        return
    path = run.stage(stage) / f"bad_batch-step-{step}.pt"
    if rank() == 0:
        dump_batch(run.stage(stage), step, batch())
    barrier()  # a rank that ends makes the launcher end the others
    good = step_folders(run.checkpoints(stage))
    remedy = f"Lower {key}.learning_rate"
    if key == stage:
        last = f"go on from {good[-1]} with --resume" if good else "start the stage again"
        remedy += f" or {key}.max_grad_norm, and {last}"
    if step == 1:
        remedy = "No update came before it: look for NaN in the weights that the stage starts from"
    elif step == begun + 1:
        remedy = f"The weights of {good[-1]} are too large: remove it to go on from an earlier one"
    raise ValueError(f"stopped at step {step}: {', '.join(bad)}. {path} holds the batch. {remedy}")


def dump_batch(folder: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Writes a step's tensors to folder/bad_batch-step-N.pt, with the rows that are not finite.

    The file holds a dict for `torch.load`: the tensors (rows first) by name, on the CPU, and
    `not_finite_rows`, name -> indices of the rows with NaN or infinity.
    """
    content: dict[str, Any] = {name: t.detach().cpu() for name, t in tensors.items()}
    content["not_finite_rows"] = {
        name: (~t.isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist()
        for name, t in content.items()
        if t.is_floating_point() and t.dim() > 0
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bad_batch-step-{step}.pt"
    torch.save(content, path)
    return path
