"""Speed and memory of SFT beside plain TRL SFTTrainer and a bare torch loop.

    python benchmarks/sft_speed.py TOKENIZER_FOLDER DATA_FILE [--steps 3] [--rounds 2] [--out FILE]

LoRA r=16 on all linear layers of a 15M LLaMA with random weights, 8 rows of at most 512 tokens a
step, float32. The conversations are tokenised once and alike for all. `bare` trains on the very
rows of `ours` with the model's own loss, so their losses must agree.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from beside_trl import (
    CHAT,
    LENGTH,
    LORA,
    Recorder,
    StepClock,
    bare_loop,
    compare,
    logged_losses,
    report,
    trl_settings,
)
from datasets import Dataset
from measuring import training_flops
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from chatllama.config.model import BackboneSection
from chatllama.config.schema import Config, SftSection
from chatllama.model.roles import lora_config
from chatllama.runs.folder import RunFolder
from chatllama.text.tokenizer import load_tokenizer

ROWS, LEARNING_RATE = 8, 1e-4
VARIANTS = ("ours", "trl", "bare", "ours-unpacked", "trl-unpacked")


def tokenize(records: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Conversations as token ids and loss masks."""
    from data.tokenize import tokenize

    return tokenize(records, "sft", tokenizer, CHAT, LENGTH)[0]


def child(arguments: argparse.Namespace, documents: Dataset) -> None:
    """One variant, in this process."""
    packing = not arguments.variant.endswith("-unpacked")
    if arguments.variant.startswith("ours"):
        run_ours(arguments, documents, packing)
    elif arguments.variant == "bare":
        run_bare(arguments, documents)
    else:
        run_trl(arguments, documents, packing)


class Counted:
    """A collator that remembers what it has collated, one batch a step."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator
        self.batches: list[tuple[list[int], int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """The batch; its documents' lengths and number of trained positions are kept."""
        lengths = [n for row in rows for n in row.get("seq_lengths") or [len(row["input_ids"])]]
        self.batches.append((lengths, sum(x != -100 for row in rows for x in row["labels"])))
        return self.collator(rows)

    def timed(self, steps: int, work: Path) -> tuple[int, float]:
        """Tokens and FLOPs of the batches after the first; a Trainer collates some ahead."""
        config = LlamaConfig.from_pretrained(work / "model")
        batches = self.batches[1 : steps + 1]
        tokens = sum(sum(lengths) for lengths, _ in batches)
        return tokens, sum(training_flops(*batch, config=config) for batch in batches)


def our_rows(arguments: argparse.Namespace, documents: Dataset, packing: bool) -> Any:
    """Config and rows of our own SFT."""
    from trainers.sft.data import arrange_rows

    section = SftSection(
        steps=arguments.steps + 1,  # the first warms up
        batch_size=ROWS,
        microbatch_size=ROWS,
        max_length=LENGTH,
        packing=packing,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        weight_decay=0.0,
        adam_betas=[0.9, 0.999],
    )
    cfg = Config(
        run_dir=str(arguments.work / "run"),
        seed=arguments.seed,
        backbone=BackboneSection(path=str(arguments.work / "model"), dtype="float32"),
        lora=LORA,
        sft=section,
    )
    return cfg, arrange_rows(documents, None, section, arguments.seed)


def run_ours(arguments: argparse.Namespace, documents: Dataset, packing: bool) -> None:
    """Our optimizer steps, as train_sft.py makes them."""
    from trainers.engine.engine import seed_step
    from trainers.sft.data import RowCollator
    from trainers.sft.model import build_engine, build_policy
    from trainers.sft.train import Trained, optimizer_step

    cfg, rows = our_rows(arguments, documents, packing)
    model = build_policy(cfg, RunFolder(Path(cfg.run_dir)))
    engine = build_engine(cfg, model)
    pad_id = cast(int, load_tokenizer(arguments.work / "model").pad_token_id)
    counted = Counted(RowCollator(pad_id))
    trained = Trained(cfg.sft, engine, rows, counted, use_bfloat16=False)
    clock, losses = StepClock(), []
    for step in range(arguments.steps + 1):
        seed_step(cfg.seed, step)
        losses.append(optimizer_step(trained, step, 1.0)["sft/loss"])
        clock.step_ended()
    report(clock, *counted.timed(arguments.steps, arguments.work), losses)


def run_bare(arguments: argparse.Namespace, documents: Dataset) -> None:
    """The model's own loss over all positions, in the loop everybody writes."""
    from peft import get_peft_model

    from trainers.sft.data import RowCollator

    _, rows = our_rows(arguments, documents, True)
    llama = AutoModelForCausalLM.from_pretrained(arguments.work / "model", dtype=torch.float32)
    torch.manual_seed(arguments.seed)
    model = get_peft_model(llama, lora_config(LORA), adapter_name="policy")
    counted = Counted(RowCollator(0))
    starts = range(0, (arguments.steps + 1) * ROWS, ROWS)
    batches = (counted([rows.train[i] for i in range(at, at + ROWS)]) for at in starts)
    clock, losses = bare_loop(
        model, LEARNING_RATE, batches, lambda batch: model(**batch, use_cache=False).loss
    )
    report(clock, *counted.timed(arguments.steps, arguments.work), losses)


def run_trl(arguments: argparse.Namespace, documents: Dataset, packing: bool) -> None:
    """TRL's trainer."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(arguments.seed)
    recorder = Recorder()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.work / "model", dtype=torch.float32),
        args=SFTConfig(
            packing=packing,
            completion_only_loss=True,
            **trl_settings(arguments, ROWS, LEARNING_RATE),
        ),
        train_dataset=documents.rename_column("mask", "completion_mask"),
        processing_class=load_tokenizer(arguments.work / "model"),
        peft_config=lora_config(LORA),
        callbacks=[recorder],
    )
    trainer.data_collator = counted = Counted(trainer.data_collator)
    trainer.train()
    report(recorder.clock, *counted.timed(arguments.steps, arguments.work), logged_losses(trainer))


if __name__ == "__main__":
    compare(__file__, __doc__ or "", VARIANTS, "sft", tokenize, child)
