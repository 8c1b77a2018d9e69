"""The cells of docs/parallelism.md: which combinations there are, and how one is run.

A cell is the three stages, by their own scripts, on a LLaMA of 40,000 random weights and the
project's garden notes (full fine-tuning: the first two stages; PPO trains adapters in any case).
`parallelism.py` starts this file once for every number of ranks and ZeRO stage; the cells run one
after another in the same processes. Each leaves one line of JSON.
"""

import argparse
import gc
import gzip
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

PROJECT = Path(__file__).resolve().parent.parent
SAMPLES = PROJECT / "data" / "samples" / "garden_notes"
STAGES = ("sft", "reward", "ppo")
BATCH = 8
"""Sequences per optimizer step, over all ranks, in every stage."""
NOT_COMPARED = ("time", "step", "sft/tokens_per_second", "reward/tokens_per_second")
CONFIG = """\
run_dir: {folder}/run
backbone: {{path: {folder}/base}}
chat: {{template: llama2}}
tracking: {{report_to: [], sample_every: 0}}
deepspeed: {{stage3_param_persistence_threshold: 0}}
sft:
  data: [{{path: {folder}/sft.jsonl}}]
  batch_size: {batch}
  max_length: 160
  learning_rate: 3e-3
  steps: 2
reward:
  data: [{{path: {folder}/preferences.jsonl}}]
  eval_fraction: 0.2
  batch_size: {batch}
  max_length: 224
  learning_rate: 3e-3
  steps: 2
  allow_weak: true
ppo:
  data: [{{path: {folder}/prompts.jsonl}}]
  rollout_batch_size: {rollout}
  minibatch_size: {batch}
  epochs: 1
  learning_rate: 1e-3
  score_normalization_samples: {batch}
  steps: 2
generation: {{max_new_tokens: 12}}
evaluation: {{num_prompts: 0}}
"""
SETTINGS_OF_BFLOAT16 = ("generation.batch_size=1", *(f"{s}.adam_eps=1e-4" for s in STAGES))
"""A row's rounding depends on its batch; Adam makes a full step of an element that is rounding."""
Weights = Literal["LoRA", "full"]
Dtype = Literal["float32", "bfloat16"]
Offload = Literal["none", "optimizer", "parameters", "both"]


@dataclass(frozen=True)
class Cell:
    """One combination of settings, apart from ranks and ZeRO stage."""

    weights: Weights
    dtype: Dtype
    accumulates: bool
    """Microbatches of one sequence; else one microbatch per optimizer step."""
    checkpointing: bool
    offload: Offload

    @property
    def name(self) -> str:
        """Words that name the cell in result files."""
        return " ".join(str(value) for value in asdict(self).values())

    @property
    def stages(self) -> tuple[str, ...]:
        """What is run: PPO always trains adapters, so full fine-tuning ends before it."""
        return STAGES if self.weights == "LoRA" else STAGES[:2]

    def microbatch_size(self, ranks: int) -> int:
        """Sequences per forward pass on one rank."""
        return 1 if self.accumulates else BATCH // ranks

    def overrides(self, run_dir: Path, microbatch_size: int, zero: int) -> list[str]:
        """The cell as settings on the command line of the training scripts."""
        offloads = {"optimizer": ("optimizer",), "parameters": ("param",)}
        offloads |= {"none": (), "both": ("optimizer", "param")}
        return [
            f"run_dir={run_dir}",
            f"backbone.dtype={self.dtype}",
            f"backbone.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"deepspeed.stage={zero}",
            *(SETTINGS_OF_BFLOAT16 if self.dtype == "bfloat16" else []),
            *(["lora=null"] if self.weights == "full" else []),
            *(f"deepspeed.offload_{what}=cpu" for what in offloads[self.offload]),
            *(f"{stage}.microbatch_size={microbatch_size}" for stage in STAGES),
        ]


def cells(zero: int, ranks: int = 2) -> list[Cell]:
    """All combinations that a ZeRO stage allows; above 2 ranks every other one.

    There accumulation comes with checkpointing, and offloading is none or all.
    """
    offloads: tuple[Offload, ...] = ("none",)
    if zero in (1, 2):
        offloads = ("none", "optimizer")
    if zero == 3:
        offloads = ("none", "optimizer", "parameters", "both") if ranks == 2 else ("none", "both")
    switch = (False, True)
    every = [
        Cell(*values)
        for values in product(get_args(Weights), get_args(Dtype), switch, switch, offloads)
    ]
    return [cell for cell in every if ranks == 2 or cell.accumulates == cell.checkpointing]


def references(ranks: Sequence[int]) -> list[tuple[Cell, int]]:
    """What one process must run to be compared with: cells and microbatch sizes.

    PPO's minibatches are made of microbatches, so only runs with the same one are comparable.
    """
    sizes = sorted({1, *(BATCH // count for count in ranks)})
    plain = [c for c in cells(0) if not (c.accumulates or c.checkpointing)]
    return [(cell, size) for cell in plain for size in sizes]


def reference_name(cell: Cell, microbatch_size: int) -> str:
    """Names the run in one process that a cell is compared with."""
    return f"{cell.weights} {cell.dtype} {microbatch_size}"


def prepare(folder: Path) -> None:
    """The base, its tokenizer, small data and the config that all cells share."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from chatllama.text.tokenizer import train_tokenizer

    for name, count in (("sft", 48), ("preferences", 30), ("prompts", 30)):
        source = SAMPLES / f"{name}.jsonl"
        if source.is_file():
            lines = source.read_text(encoding="utf-8").splitlines()[:count]
        else:
            with gzip.open(f"{source}.gz", "rt", encoding="utf-8") as packed:
                lines = [next(packed).rstrip("\n") for _ in range(count)]
        (folder / source.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [json.loads(line)["completion"] for line in (folder / "sft.jsonl").open()]
    train_tokenizer([*texts, "[INST] Write a note to [/INST]"] * 20, 320, folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    text = CONFIG.format(folder=folder, batch=BATCH, rollout=2 * BATCH)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def run_cell(folder: Path, cell: Cell, microbatch_size: int, zero: int, place: str) -> dict:
    """The metrics of the three stages, as their own scripts log them."""
    import train_ppo
    import train_rm
    import train_sft
    from chatllama.runtime.distributed import barrier, rank

    run_dir = folder / "runs" / place
    if rank() == 0:
        shutil.rmtree(run_dir, ignore_errors=True)  # of a start that was interrupted
    barrier()
    command = [str(folder / "config.yaml"), *cell.overrides(run_dir, microbatch_size, zero)]
    mains: dict[str, Callable] = {
        "sft": train_sft.main,
        "reward": train_rm.main,
        "ppo": train_ppo.main,
    }
    metrics, started = {}, time.monotonic()
    for stage in cell.stages:
        mains[stage](command)
        barrier()
        gc.collect()
        lines = (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics[stage] = [
            {k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED} for line in lines
        ]
    barrier()
    if rank() == 0:
        shutil.rmtree(run_dir)
    return {"metrics": metrics, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Runs the cells that the results file does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--local_rank")
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("zero", type=int)
    parser.add_argument("ranks", type=int, nargs="+")
    arguments = parser.parse_args()
    sys.path.insert(0, str(PROJECT))

    from chatllama.config.schema import DeepSpeedSection
    from chatllama.runtime import distributed
    from trainers.engine.start import initialise

    initialise(DeepSpeedSection())
    # Every script ends by leaving the process group; here the next cell still needs it.
    leave, distributed.shut_down = distributed.shut_down, distributed.barrier
    ranks = distributed.world_size()
    if ranks > 1:
        todo = [(c, c.microbatch_size(ranks), c.name) for c in cells(arguments.zero, ranks)]
    else:
        todo = [(c, size, reference_name(c, size)) for c, size in references(arguments.ranks)]
        if distributed.is_launched():  # only bfloat16 asks which engine ran
            todo = [entry for entry in todo if entry[0].dtype == "bfloat16"]
    written = arguments.results.read_text().splitlines() if arguments.results.is_file() else []
    done = {json.loads(line)["cell"] for line in written}
    for number, (cell, size, name) in enumerate(todo):
        if name in done:
            continue
        try:
            place = f"{arguments.results.stem}-{number}"
            found = run_cell(arguments.folder, cell, size, arguments.zero, place)
        except BaseException as error:
            traceback.print_exc()
            if not isinstance(error, SystemExit) or distributed.rank() == 0:
                print(f"cell {name!r} failed on rank {distributed.rank()}", file=sys.stderr)
            raise
        if distributed.rank() == 0:
            with arguments.results.open("a") as file:
                file.write(json.dumps({"cell": name, **found}) + "\n")
            print(f"[cell] {name}: {found['seconds']} s", flush=True)
        gc.freeze()  # the libraries' objects: walking over them would be a third of the time
    leave()


if __name__ == "__main__":
    main()
