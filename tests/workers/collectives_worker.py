"""What tests/engine/test_collectives.py runs on two ranks: what a step sends and allocates.

Needs nothing of the engine but its public functions, so that older versions can be measured too.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workers import engine_worker

from chatllama.config.schema import DeepSpeedSection
from chatllama.runtime.distributed import rank, shut_down, wait_limit
from trainers.engine.start import initialise

dist: Any = torch.distributed
REDUCTIONS = (
    "all_reduce",
    "reduce",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "reduce_scatter",
)
GATHERS = ("all_gather_into_tensor", "all_gather", "broadcast")
SENT: Counter[str] = Counter()
"""Collectives of tensors with more than one element."""
ALLOCATED = [0]
"""Elements of the largest tensor that was made without a value."""


def watch() -> None:
    """Must come before DeepSpeed takes the functions of torch for its own."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if tensors and max(tensor.numel() for tensor in tensors) > 1:
                SENT["reductions" if name in REDUCTIONS else "gathers"] += 1
            return function(*args, **kwargs)

        return call

    def noted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = function(*args, **kwargs)
            ALLOCATED[0] = max(ALLOCATED[0], made.numel())
            return made

        return make

    for name in (*REDUCTIONS, *GATHERS):
        setattr(dist, name, counted(name, getattr(dist, name)))
    for name in ("empty", "zeros"):
        setattr(torch, name, noted(getattr(torch, name)))


@contextmanager
def own_section(section: DeepSpeedSection) -> Iterator[None]:
    """`engine_worker.build` under this section."""
    before = engine_worker.deepspeed_section
    engine_worker.deepspeed_section = lambda stage: section
    try:
        yield
    finally:
        engine_worker.deepspeed_section = before


def limits(engine: Any) -> list[float]:
    """Minutes that a collective may take, of the engine's group and of torch's own."""
    groups = [dist.group.WORLD, engine._deepspeed.optimizer.dp_process_group]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() / 60 for backend in backends]


def run(base: str, stage: int, offload: str, microbatch_size: int) -> dict[str, Any]:
    """Two steps; the collectives of the second."""
    section = DeepSpeedSection.model_validate(
        {"stage": stage, "stage3_param_persistence_threshold": 0, "offload_optimizer": offload}
    )
    ALLOCATED[0] = 0
    with own_section(section):
        engine = engine_worker.build(base, microbatch_size=microbatch_size)
    steps = [engine_worker.step(engine, 0)]
    SENT.clear()
    steps.append(engine_worker.step(engine, 1))
    sent = dict(SENT)
    return {
        "steps": steps,
        "sent": {"reductions": sent.get("reductions", 0), "gathers": sent.get("gathers", 0)},
        "allocated": ALLOCATED[0],
        "limits": limits(engine),
        "trained": sum(p.numel() for p in engine_worker.weights(engine, trained=True).values()),
        "all": sum(engine.whole_value(p).numel() for p in engine.model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    watch()
    initialise(DeepSpeedSection(timeout_minutes=7.0))
    assert wait_limit().total_seconds() == 7 * 60
    cases = [(s, "none", size) for s in (1, 2, 3) for size in (2, 4)]
    found = {
        " ".join(map(str, case)): run(arguments.base, *case)
        for case in [*cases, (2, "cpu", 2), (3, "cpu", 2)]
    }
    (arguments.folder / f"out-{rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
