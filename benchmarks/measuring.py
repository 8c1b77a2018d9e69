"""What the speed benchmarks share: model, clocks, the machine's limit, child processes, tables.

Every variant runs in a process of its own, so that its peak memory is its own, and several times
in turn (A B A B), so that a noisy machine hurts all alike. CPU seconds count all threads.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 32_000, 288, 768, 6, 6


def write_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """A LLaMA of 15 million parameters with random weights, embeddings tied, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


def training_flops(lengths: Sequence[int], scored: int) -> float:
    """Matmul FLOPs that training LoRA adapters on these documents needs, forward and backward.

    The frozen weights' own gradients and the adapters' few percent are not counted; attention
    counts the pairs of positions that see each other.

    Args:
        lengths: tokens of each document.
        scored: positions that go through the LM head.
    """
    weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = LAYERS * 2 * WIDTH * 2 * pairs * 3  # two products, two more each backward
    return 4.0 * weights * sum(lengths) + attention + 4.0 * VOCABULARY * WIDTH * scored


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds by the wall and of the CPU, all threads together."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def gemm_rates(seconds: float = 1.0) -> tuple[float, float]:
    """FLOPs a second and a CPU second of a float32 product, 4096 x 288 x 768.

    Args:
        seconds: of the CPU, to measure for.
    """
    left, right = torch.randn(4096, WIDTH), torch.randn(WIDTH, INNER)
    product = left @ right
    clock, count = Clock(), 0
    while clock.read()[1] < seconds:
        torch.mm(left, right, out=product)
        count += 1
    wall, cpu = clock.read()
    flops = 2.0 * 4096 * WIDTH * INNER * count
    return flops / wall, flops / cpu


def peak_mib() -> int:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        2**20 if sys.platform == "darwin" else 2**10
    )


class StepClock:
    """Times the optimizer steps after the first, which warms up."""

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self.wall, self.cpu, self.steps = 0.0, 0.0, 0

    def step_ended(self) -> None:
        """To be called at the end of every step."""
        if self._clock is None:
            self._clock = Clock()
            return
        self.wall, self.cpu = self._clock.read()
        self.steps += 1


class Recorder(TrainerCallback):
    """Times the steps of a Trainer."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One more step."""
        self.clock.step_ended()


def report(clock: StepClock, units: float, flops: float, **more: object) -> None:
    """Prints what a child measured as its last line.

    Args:
        clock: after the last step.
        units: tokens or pairs of the timed steps.
        flops: from `training_flops`, of the timed steps.
        **more: further columns.
    """
    peak = peak_mib()
    gemm_wall, gemm_cpu = gemm_rates()
    row = {
        "per_second": units / clock.wall,
        "per_cpu_second": units / clock.cpu,
        "cpu_seconds": clock.cpu,
        "peak_mib": peak,
        "mfu": flops / clock.cpu / gemm_cpu,
        "gemm_gflops": gemm_cpu / 1e9,
        "gemm_gflops_wall": gemm_wall / 1e9,
    }
    print(json.dumps(row | more), flush=True)


def run_rounds(
    script: str, variants: Sequence[str], rounds: int, arguments: Iterable[str], threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Every variant's rows, each from a child process: A B C, A B C ...

    Raises:
        RuntimeError: a child failed.
    """
    rows: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    for _ in range(rounds):
        for variant in variants:
            command = [sys.executable, script, *arguments, "--variant", variant]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"variant {variant} failed:\n{done.stderr[-4000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            rows[variant].append(row)
            print(variant, json.dumps(row), flush=True)
    return rows


def table(rows: dict[str, list[dict[str, Any]]], unit: str, against: str) -> str:
    """A Markdown table of medians over the rounds, with ratios to the variant `against`."""
    names = (
        "variant",
        f"{unit} per CPU second",
        "ratio",
        f"{unit} per second",
        "peak MiB",
        "ratio",
        "MFU",
        "GEMM GFLOP per CPU second",
    )
    lines = [" | ".join(("", *names, "")).strip(), "|---" * len(names) + "|"]
    middle = {v: {k: _median(each, k) for k in each[0]} for v, each in rows.items()}
    base = middle[against]
    for variant, row in middle.items():
        speed, memory = (row[k] / base[k] for k in ("per_cpu_second", "peak_mib"))
        lines.append(
            f"| {variant} | {row['per_cpu_second']:,.1f} | {speed:.2f} | {row['per_second']:,.1f} "
            f"| {row['peak_mib']:,.0f} | {memory:.2f} | {row['mfu']:.0%} "
            f"| {row['gemm_gflops']:.0f} |"
        )
    return "\n".join(lines)


def _median(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows]
    return statistics.median(values) if isinstance(values[0], int | float) else float("nan")


def hardware(threads: int) -> str:
    """Machine, threads, versions and load, for the head of a results file."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    from importlib.metadata import version

    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "trl", "peft"))
    return (
        f"{datetime.date.today()}; {model}, {os.cpu_count()} cores, {threads} threads; load "
        f"{os.getloadavg()[0]:.1f} at the end; {libraries}"
    )


def common_arguments(description: str, variants: Sequence[str]) -> argparse.ArgumentParser:
    """The command line that the benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.model")
    parser.add_argument("data", type=Path, help="in any format that chatllama reads")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(variants), choices=variants)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # set in children
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


def measure_all(script: str, arguments: argparse.Namespace, work: Path, unit: str) -> None:
    """Runs all variants in turn, prints the table, and writes it where `--out` says.

    Args:
        script: the benchmark's own file.
        arguments: from `common_arguments`.
        work: what the children read.
        unit: what is counted, in the plural.
    """
    shared = ("steps", "seed", "threads")
    passed = [str(arguments.tokenizer), str(arguments.data), "--work", str(work)]
    passed += [text for key in shared for text in (f"--{key}", str(getattr(arguments, key)))]
    rows = run_rounds(script, arguments.variants, arguments.rounds, passed, arguments.threads)
    against = "trl" if "trl" in rows else arguments.variants[0]
    text = (
        f"{table(rows, unit, against)}\n\n{hardware(arguments.threads)}; seed {arguments.seed}, "
        f"{arguments.data.name}, {arguments.steps} timed steps, {arguments.rounds} rounds, "
        f"medians; ratios to {against}."
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
