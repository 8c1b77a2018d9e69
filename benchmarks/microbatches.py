"""Ways to cut a rollout batch into microbatches: peak memory, CPU seconds and evenness.

    python benchmarks/microbatches.py [--rounds 2] [--pairs HH_FILE] [--out FILE]

The model and trainer of `ppo_speed.py`, 32 responses whose lengths are given, in four microbatches,
are scored and make one epoch of updates. Ways: `rows`, sorted by length and cut into equally many
rows; `stretches`, sorted by length and cut where the largest number of tokens is least; `tokens`,
as the project does it. Cases: `ragged`, 64 tokens and geometric answers, mean 32, at most 128;
`skewed`, geometric prompts and answers, means 48, one answer in eight of 384 tokens. Every
measurement is a process of its own, in turn (A B C A B C). With `--pairs`, the positions that the
reward model computes for batches of 64 of Anthropic's pairs are counted instead, a token being four
characters.
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import VOCABULARY, Clock, hardware, peak_mib, publish, run_child
from ppo_speed import STOP, make_trainer, write_models

from data.batches import SharedPromptCollator, batch_indices
from trainers.engine.microbatches import balanced_groups
from trainers.ppo.data import prompt_row
from trainers.ppo.rewards import Statistics
from trainers.ppo.rollout import Rollout
from trainers.ppo.state import PpoState

ROWS, CAP = 32, 384
CASES = ("ragged", "skewed")
PAIR, BATCH, STEPS = ("chosen", "rejected"), 64, 25
Way = Callable[[Sequence[int], int], list[list[int]]]


def by_rows(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Equally many rows each, from short to long."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    size = len(order) // count
    return [order[start : start + size] for start in range(0, len(order), size)]


def by_stretches(lengths: Sequence[int], count: int) -> list[list[int]]:
    """From short to long, cut where the largest total is least."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])

    def cut(budget: int) -> list[list[int]]:
        pieces: list[list[int]] = [[]]
        for place, row in enumerate(order):
            full = sum(lengths[r] for r in pieces[-1]) + lengths[row] > budget
            needed = len(order) - place <= count - len(pieces)  # a row for each that is left
            if pieces[-1] and (full or needed):
                pieces.append([])
            pieces[-1].append(row)
        return pieces

    budget = max(max(lengths), -(-sum(lengths) // count))
    while len(cut(budget)) > count:
        budget += 1
    return cut(budget)


WAYS: dict[str, Way] = {"rows": by_rows, "stretches": by_stretches, "tokens": balanced_groups}


def main() -> None:
    """Runs the children in turn and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--pairs", type=Path, help="transcripts, .jsonl.gz: only count positions")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.work, arguments.case, WAYS[arguments.child])))
        return
    if arguments.pairs:
        publish(count_pairs(arguments.pairs), arguments.out)
        return
    lines = [hardware(arguments.threads), "", *HEADER]
    with tempfile.TemporaryDirectory() as work:
        write_models(Path(work), None)
        for case in CASES:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(arguments.rounds):
                for way, rows in found.items():
                    command = [sys.executable, __file__, "--child", way, "--case", case]
                    rows.append(run_child([*command, "--work", work], arguments.threads))
                    print(case, way, json.dumps(rows[-1]), flush=True)
            lines += [row_of(case, way, rows) for way, rows in found.items()]
    publish(lines, arguments.out)


HEADER = (
    "| case | way | tokens of the microbatches | scoring, CPU s | update, CPU s | peak MiB "
    "(before) |",
    "|---|---|---|---|---|---|",
)


def row_of(case: str, way: str, rows: list[dict[str, float]]) -> str:
    """Medians over the rounds."""
    middle = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k != "totals"}
    return (
        f"| {case} | {way} | {rows[0]['totals']} | {middle['scoring']:.2f} | "
        f"{middle['update']:.2f} | {middle['peak']:,.0f} ({middle['before']:,.0f}) |"
    )


def count_pairs(path: Path) -> list[str]:
    """Positions of the largest microbatch of a step, and of the ranks' shares, by two ways."""
    examples: list[dict[str, Any]] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for pair in map(json.loads, file):
            chosen, rejected = (pair[name].rpartition("\n\nAssistant:") for name in PAIR)
            if chosen[0] == rejected[0]:
                split = len(chosen[0]) // 4 + 1
                answers = [[0] * (split + len(each[2]) // 4 + 4) for each in (chosen, rejected)]
                example = {"prompt_length": split, "answer_ids": answers}
                examples.append({**example, "ranks": [0, 1], "ratings": [0.0, 0.0]})
    collator = SharedPromptCollator(0, 512)
    examples = [e for e in examples if max(map(len, e["answer_ids"])) <= collator.max_length]
    lines = ["| pairs a microbatch | way | largest of a step | slowest of as many ranks |"]
    lines.append("|---|---|---|---|")
    for size in (8, 2):
        count = BATCH // size
        as_they_come = [list(range(BATCH))[place : place + size] for place in range(0, BATCH, size)]
        found: dict[str, list[list[int]]] = {"rows": [], "tokens": []}
        for step in range(STEPS):
            batch = [examples[i] for i in batch_indices(len(examples), BATCH, step, 0)]
            lengths = [collator.num_tokens(example) for example in batch]
            cuts = {"rows": as_they_come, "tokens": balanced_groups(lengths, count)}
            for way, groups in cuts.items():
                rows = [collator([batch[place] for place in group])[0] for group in groups]
                found[way].append([each.tokens.numel() for each in rows])
        for way, steps in found.items():
            largest = statistics.mean(map(max, steps))
            slowest = statistics.mean(max(each) * count / sum(each) for each in steps)
            lines.append(f"| {size} | {way} | {largest:,.0f} | {slowest:.2f} of the mean |")
    return lines


def draw_lengths(case: str) -> tuple[list[int], list[int]]:
    """Tokens of prompts and answers."""
    generator = torch.Generator().manual_seed(5)

    def geometric(mean: float, most: int) -> list[int]:
        drawn = torch.empty(ROWS).geometric_(1 / mean, generator=generator)
        return drawn.long().clamp(1, most).tolist()

    if case == "ragged":
        return [64] * ROWS, geometric(32, 128)
    answers = geometric(48, CAP)
    return geometric(48, 256), [CAP if n % 8 == 0 else answers[n] for n in range(ROWS)]


def measure(work: Path, case: str, way: Way) -> dict[str, object]:
    """One rollout batch scored and learnt from once."""
    generator = torch.Generator().manual_seed(1)
    prompts, answers = (
        [torch.randint(1000, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        for lengths in draw_lengths(case)
    )
    totals = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    trainer = make_trainer(work, prompts, CAP, [STOP], 1)
    trainer.cfg = trainer.cfg.model_copy(
        update={"ppo": trainer.cfg.ppo.model_copy(update={"epochs": 1})}
    )

    def cut(self: Rollout, size: int) -> list[list[int]]:
        return way(totals, -(-len(self.tokens) // size))

    Rollout.microbatches = cut
    before, clock = peak_mib(), Clock()
    records = [prompt_row(prompt, "") for prompt in prompts]
    rollout, _ = trainer.collector.collect("policy", records, (0, 0), responses=answers)
    scoring = clock.read()[1]
    state = PpoState(0, 0.05, Statistics())
    targets, _ = trainer._targets(rollout, state)
    clock = Clock()
    trainer._update(rollout, targets, state)
    cuts = cut(rollout, trainer.cfg.ppo.microbatch_size)
    return {
        "totals": ", ".join(str(sum(totals[row] for row in rows)) for rows in cuts),
        "scoring": scoring,
        "update": clock.read()[1],
        "before": before,
        "peak": peak_mib(),
    }


if __name__ == "__main__":
    main()
