"""What the speed benchmarks of SFT and of the reward stage share.

Every variant runs in a process of its own, so that its peak memory is its own, and several times
in turn (A B A B), so that a noisy machine hurts all alike.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from measuring import Clock, gemm_rates, hardware, llama_config, peak_mib, publish, run_child
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from chatllama.config.model import ChatSection, LoraSection
from chatllama.config.sources import DataSource
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

LENGTH = 512
LORA = LoraSection(r=16, alpha=32)
CHAT = ChatSection(template="llama2")
Tokenize = Callable[[Dataset, PreTrainedTokenizerFast], Dataset]


def compare(
    script: str,
    description: str,
    variants: Sequence[str],
    kind: Literal["sft", "preferences"],
    tokenize: Tokenize,
    child: Callable[[argparse.Namespace, Dataset], None],
) -> None:
    """The command line of a benchmark: runs all variants in turn and publishes their table.

    Args:
        script: the benchmark's own file.
        description: its docstring.
        variants: names; the first is the measure of the ratios where there is no `trl`.
        kind: of the records that the data file holds.
        tokenize: turns them into what all variants train on.
        child: measures `arguments.variant` on that, and calls `report`.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="folder with a tokenizer, or a model")
    parser.add_argument("--model", action="store_true", help="measure the model in that folder")
    parser.add_argument("data", type=Path, help="in any format that chatllama reads")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(variants), choices=variants)
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # set in children
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    disable_progress_bars()
    if arguments.variant:
        torch.set_num_threads(arguments.threads)
        child(arguments, cast(Dataset, load_from_disk(arguments.work / "examples")))
        return
    with tempfile.TemporaryDirectory() as folder:
        _prepare(arguments, Path(folder), kind, tokenize)
        unit = "tokens" if kind == "sft" else "pairs"
        publish(_measure_all(script, arguments, Path(folder), unit), arguments.out)


def _prepare(arguments: argparse.Namespace, work: Path, kind: Any, tokenize: Tokenize) -> None:
    """The model, with random weights unless one was given, its tokenizer, the data as tokens."""
    from data.reading.source import read_source

    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.model:
        shutil.copytree(arguments.tokenizer, work / "model")
    else:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        config = llama_config(tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, **ids)
        torch.manual_seed(arguments.seed)
        LlamaForCausalLM(config).save_pretrained(work / "model")
        save_tokenizer(tokenizer, work / "model")
    records, _ = read_source(DataSource(path=str(arguments.data)), kind)
    tokenize(records, tokenizer).save_to_disk(work / "examples")


def _measure_all(
    script: str, arguments: argparse.Namespace, work: Path, unit: str
) -> tuple[str, ...]:
    command = [sys.executable, script, arguments.tokenizer, arguments.data, "--work", work]
    for key in ("steps", "seed", "threads"):
        command += [f"--{key}", vars(arguments)[key]]
    rows: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
    for _ in range(arguments.rounds):
        for variant in rows:
            row = run_child([*command, "--variant", variant], arguments.threads)
            rows[variant].append(row)
            print(variant, json.dumps(row), flush=True)
    against = "trl" if "trl" in rows else arguments.variants[0]
    return (
        *_table(rows, unit, against),
        "",
        f"{hardware(arguments.threads)}; seed {arguments.seed}, {arguments.data.name}, "
        f"{arguments.steps} timed steps, {arguments.rounds} rounds, medians; ratios to {against}.",
    )


def _table(rows: dict[str, list[dict[str, Any]]], unit: str, against: str) -> list[str]:
    """A Markdown table of medians over the rounds, with ratios to the variant `against`."""
    lines = [
        f"| variant | {unit} per CPU second | ratio | {unit} per second | peak MiB | ratio | MFU "
        "| GEMM GFLOP per CPU second |",
        "|---" * 8 + "|",
    ]
    middle = {
        variant: {key: statistics.median(row[key] for row in each) for key in MEASURED}
        for variant, each in rows.items()
    }
    base = middle[against]
    for variant, row in middle.items():
        speed, memory = (row[k] / base[k] for k in ("per_cpu_second", "peak_mib"))
        lines.append(
            f"| {variant} | {row['per_cpu_second']:,.1f} | {speed:.2f} | {row['per_second']:,.1f} "
            f"| {row['peak_mib']:,.0f} | {memory:.2f} | {row['mfu']:.0%} "
            f"| {row['gemm_gflops']:.0f} |"
        )
    return lines


MEASURED = ("per_second", "per_cpu_second", "peak_mib", "mfu", "gemm_gflops")


class StepClock:
    """Times the optimizer steps after the first, which warms up."""

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self.wall, self.cpu = 0.0, 0.0

    def step_ended(self) -> None:
        """To be called at the end of every step."""
        if self._clock is None:
            self._clock = Clock()
            return
        self.wall, self.cpu = self._clock.read()


class Recorder(TrainerCallback):
    """Times the steps of a Trainer."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One more step."""
        self.clock.step_ended()


def report(clock: StepClock, units: float, flops: float, losses: Sequence[float]) -> None:
    """Prints what a child measured as its last line.

    Args:
        clock: after the last step.
        units: tokens or pairs of the timed steps.
        flops: from `training_flops`, of the timed steps.
        losses: of all steps.
    """
    peak = peak_mib()
    gemm = gemm_rates()[1]
    row = {
        "per_second": units / clock.wall,
        "per_cpu_second": units / clock.cpu,
        "peak_mib": peak,
        "mfu": flops / clock.cpu / gemm,
        "gemm_gflops": gemm / 1e9,
        "losses": losses,
    }
    print(json.dumps(row), flush=True)


def bare_loop(
    model: torch.nn.Module,
    learning_rate: float,
    batches: Iterable[Any],
    loss_of: Callable[[Any], torch.Tensor],
) -> tuple[StepClock, list[float]]:
    """The loop that everybody writes: loss, backward, clipping, AdamW. Returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    clock, losses = StepClock(), []
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        clock.step_ended()
    return clock, losses


def trl_settings(arguments: argparse.Namespace, rows: int, learning_rate: float) -> dict[str, Any]:
    """A TRL trainer as it is, without activation checkpointing and in float32 like the others.

    Args:
        arguments: of the command line.
        rows: of one step.
        learning_rate: constant.
    """
    return {
        "output_dir": str(arguments.work / "trl"),
        "max_steps": arguments.steps + 1,
        "per_device_train_batch_size": rows,
        "max_length": LENGTH,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": arguments.seed,
    }


def logged_losses(trainer: Any) -> list[float]:
    """What a Trainer logged, a step each."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
