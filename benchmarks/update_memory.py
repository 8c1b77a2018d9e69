"""Memory of a PPO step in tensors, beside what it cannot do without.

    python benchmarks/update_memory.py [--cases equal ragged] [--out FILE]

The trainer and the cases are those of `ppo_speed.py` (one thread, one process). Needed are the
backbone, the adapters with gradients and AdamW's moments, and what autograd keeps of the policy's
pass over the largest microbatch. Found is the most that tensors hold at once during a step (torch's
own record of its allocations), and the growth of resident memory, which also counts what the
allocator keeps in reserve and the pages of the libraries' code that the step touches.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measuring import hardware, peak_mib, publish, run_child
from ppo_speed import CASES, MICROBATCH, PROMPT, STOP, VOCABULARY, make_trainer, write_models
from torch.profiler import ProfilerActivity, profile

from chatllama.model.scoring import response_logprobs
from trainers.ppo.rewards import Statistics
from trainers.ppo.rollout import Rollout
from trainers.ppo.state import PpoState

if TYPE_CHECKING:
    from trainers.ppo.train import PpoTrainer

MIB = 2.0**20


def main() -> None:
    """Runs a child for each case and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, default=32, help="responses a step")
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.batch, arguments.work)))
        return
    lines = [
        hardware(1),
        "",
        "| case | backbone | adapters, gradients, AdamW | one microbatch's graph | needed "
        "| most in tensors | ratio | resident above the libraries | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as work:
            write_models(Path(work), CASES[case][1])
            command = [sys.executable, __file__, "--child", case, "--batch", arguments.batch]
            row = run_child([*command, "--work", work])
        needed = row["backbone"] + row["trained"] + row["graph"]
        lines.append(
            f"| {case} | {row['backbone']:,.0f} | {row['trained']:,.0f} | {row['graph']:,.0f} "
            f"| {needed:,.0f} | {row['tensors']:,.0f} | {row['tensors'] / needed:.2f} "
            f"| {row['resident']:,.0f} | {row['resident'] / needed:.2f} |"
        )
    publish(lines, arguments.out)


def measure(case: str, batch: int, work: Path) -> dict[str, float]:
    """One case, MiB."""
    torch.set_num_threads(1)
    libraries = peak_mib()
    new_tokens, mean_length = CASES[case]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1000, VOCABULARY, (batch, PROMPT), generator=generator).tolist()
    stops = [STOP] if mean_length else []
    trainer = make_trainer(work, prompts, new_tokens, stops, steps=2)
    state, rollout, *_ = trainer.advance(PpoState(0, 0.05, Statistics()))
    resident = peak_mib() - libraries
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.advance(state)
    model = trainer.engine.model
    trained = [p for p in model.parameters() if p.requires_grad]
    backbone = sum(p.nbytes for p in model.llama.parameters() if not p.requires_grad)
    moments = sum(
        value.nbytes
        for each in trainer.engine.optimizer.state.values()
        for value in each.values()
        if isinstance(value, torch.Tensor)
    )
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    weights = sum(p.nbytes for p in trained)
    return {
        "backbone": backbone / MIB,
        "trained": (2 * weights + moments) / MIB,
        "graph": graph_bytes(trainer, rollout) / MIB,
        # Gradients come and go with the record.
        "tensors": (frozen + weights + moments + most_at_once(profiled)) / MIB,
        "resident": resident,
    }


def most_at_once(profiled: Any) -> int:
    """Bytes of tensors made since the record began, at their most."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def graph_bytes(trainer: "PpoTrainer", rollout: Rollout) -> int:
    """Bytes that autograd keeps of the policy over the largest microbatch, without weights."""
    model = trainer.engine.model
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    parts = [rollout.select(rows) for rows in rollout.microbatches(MICROBATCH)]
    part = max(parts, key=lambda part: int(part.mask.sum()))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = response_logprobs(model, "policy", part.tokens, part.mask, part.response_mask, 1.0)
    assert scores.logprobs.requires_grad
    return sum(kept.values())


if __name__ == "__main__":
    main()
