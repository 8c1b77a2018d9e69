"""PPO on 1, 2 and 4 ranks: samples a second, and what the ranks' talk costs.

    python benchmarks/scaling.py [--ranks 1 2 4] [--stage 2] [--steps 2] [--out FILE]

The case `equal` of `ppo_speed.py`, its responses dealt out over the ranks through
DeepSpeed's launcher, one thread each. With fewer cores than ranks only the CPU seconds of all ranks
together say something: without overhead they stay those of one rank. The losses must agree.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from measuring import VOCABULARY, Clock, hardware, launcher, publish, run_child
from ppo_speed import PROMPT, make_trainer, write_models

from chatllama.config.schema import DeepSpeedSection
from chatllama.runtime.distributed import all_max, all_sum, rank, shut_down
from trainers.engine.start import initialise
from trainers.ppo.rewards import Statistics
from trainers.ppo.state import PpoState

NEW_TOKENS = 64


def main() -> None:
    """Launches every number of ranks and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="responses a step, all ranks")
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        measure(arguments.work, arguments.stage, arguments.steps, arguments.batch)
        return
    lines = [
        hardware(1),
        "",
        f"ZeRO-{arguments.stage}, {os.cpu_count()} cores, {arguments.batch} responses a step.",
        "",
        "| ranks | samples per second | speed-up | CPU seconds a step, all | overhead | loss |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for count in arguments.ranks:
        with tempfile.TemporaryDirectory() as work:
            write_models(Path(work), None)
            row = launch(count, work, arguments)
        first = first or row
        lines.append(
            f"| {count} | {row['rate']:.2f} | {row['rate'] / first['rate']:.2f} "
            f"| {row['cpu']:.1f} | {row['cpu'] / first['cpu'] - 1:.0%} | {row['loss']:.6f} |"
        )
        print(lines[-1], flush=True)
    publish(lines, arguments.out)


def launch(count: int, work: str, arguments: argparse.Namespace) -> dict[str, float]:
    """What rank 0 of `count` ranks printed."""
    command = [*launcher(count), __file__, "--work", work]
    for option in ("stage", "steps", "batch"):
        command += [f"--{option}", vars(arguments)[option]]
    return run_child(command)


def measure(work: Path, stage: int, steps: int, batch: int) -> None:
    """One rank's part: the first step warms up."""
    initialise(DeepSpeedSection())
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1000, VOCABULARY, (batch, PROMPT), generator=generator).tolist()
    trainer = make_trainer(work, prompts, NEW_TOKENS, [], steps + 1, stage)
    state, loss = PpoState(0, 0.05, Statistics()), 0.0
    clock = Clock()
    for step in range(steps + 1):
        if step == 1:
            clock = Clock()
        state, _, _, metrics = trainer.advance(state)
        loss = metrics["ppo/value_loss"]
    wall, cpu = clock.read()
    seconds = float(all_max(torch.tensor(wall)))
    total = float(all_sum(torch.tensor(cpu)))
    if rank() == 0:
        row = {"rate": batch * steps / seconds, "cpu": total / steps, "loss": loss}
        print("\n" + json.dumps(row), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
