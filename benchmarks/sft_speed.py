"""Speed and memory of SFT beside plain TRL SFTTrainer and a bare torch loop.

    python benchmarks/sft_speed.py TOKENIZER_FOLDER DATA_FILE [--steps 3] [--rounds 2] [--out FILE]

LoRA r=16 on all linear layers of a 15M LLaMA with random weights, 8 rows of at most 512 tokens a
step, float32. The conversations are tokenised once and alike for all. `bare` trains on the very
rows of `ours` with the model's own loss, so their losses must agree.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from measuring import (
    Recorder,
    StepClock,
    common_arguments,
    measure_all,
    report,
    training_flops,
    write_llama,
)
from transformers import AutoModelForCausalLM

from chatllama.config import (
    BackboneSection,
    ChatSection,
    Config,
    DataSource,
    LoraSection,
    SftSection,
)
from chatllama.libraries import quiet_libraries
from chatllama.roles import RoleModel, acting_as, lora_config
from chatllama.run_folder import RunFolder
from chatllama.tokenizer import load_tokenizer, save_tokenizer

ROWS, LENGTH, LEARNING_RATE = 8, 512, 1e-4
LORA = LoraSection(r=16, alpha=32)
VARIANTS = ("ours", "trl", "bare", "ours-unpacked", "trl-unpacked")


def main() -> None:
    """Measures every variant and prints the table."""
    parser = common_arguments((__doc__ or "").splitlines()[0], VARIANTS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.variant:
        child(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, Path(folder))
        measure_all(__file__, arguments, Path(folder), "tokens")


def prepare(arguments: argparse.Namespace, work: Path) -> None:
    """The model, its tokenizer, and the conversations as tokens."""
    from data.readers import read_source
    from data.sft import tokenize_conversations

    disable_progress_bars()
    tokenizer = load_tokenizer(arguments.tokenizer)
    write_llama(work / "model", tokenizer, arguments.seed)
    save_tokenizer(tokenizer, work / "model")
    records, _ = read_source(DataSource(path=str(arguments.data)), "sft")
    chat = ChatSection(template="llama2")
    documents, _ = tokenize_conversations(records, tokenizer, chat, LENGTH)
    documents.save_to_disk(work / "documents")


def child(arguments: argparse.Namespace) -> None:
    """One variant, in this process."""
    torch.set_num_threads(arguments.threads)
    documents = cast(Dataset, load_from_disk(arguments.work / "documents"))
    packing = not arguments.variant.endswith("-unpacked")
    steps = arguments.steps + 1  # the first warms up
    if arguments.variant.startswith("ours"):
        run_ours(arguments, documents, steps, packing)
    elif arguments.variant == "bare":
        run_bare(arguments, documents, steps)
    else:
        run_trl(arguments, documents, steps, packing)


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

    def timed(self, steps: int) -> dict[str, float]:
        """Tokens and FLOPs of the batches after the first."""
        batches = self.batches[1:steps]
        tokens = sum(sum(lengths) for lengths, _ in batches)
        return {"units": tokens, "flops": sum(training_flops(*batch) for batch in batches)}


def our_rows(arguments: argparse.Namespace, documents: Dataset, steps: int, packing: bool) -> Any:
    """Config and rows of our own SFT."""
    from trainers.sft import arrange_rows

    section = SftSection(
        steps=steps,
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
    seed = arguments.seed
    rows = arrange_rows(documents, None, section, max_length=LENGTH, packing=packing, seed=seed)
    return cfg, rows


def run_ours(arguments: argparse.Namespace, documents: Dataset, steps: int, packing: bool) -> None:
    """Our trainer, as train_sft.py makes it."""
    from trainers.instruction_trainer import InstructionTrainer
    from trainers.sft import build_policy, sft_arguments

    cfg, rows = our_rows(arguments, documents, steps, packing)
    run = RunFolder(Path(cfg.run_dir))
    model, recorder = build_policy(cfg, run), Recorder()
    assert isinstance(model, RoleModel)
    with acting_as(model, "policy"):
        trainer = InstructionTrainer(
            model.peft_model,
            sft_arguments(cfg, cfg.sft, run, rows),
            cfg.sft,
            rows,
            load_tokenizer(arguments.work / "model"),
            use_bfloat16=False,
            callbacks=[recorder],
        )
        trainer.data_collator = counted = Counted(trainer.data_collator)
        trainer.run(None)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(recorder.clock, **counted.timed(steps), losses=losses)


def run_bare(arguments: argparse.Namespace, documents: Dataset, steps: int) -> None:
    """A loop of ten lines: the model's own loss over all positions, backward, AdamW."""
    from peft import get_peft_model

    from trainers.instruction_trainer import RowCollator

    _, rows = our_rows(arguments, documents, steps, True)
    llama = AutoModelForCausalLM.from_pretrained(arguments.work / "model", dtype=torch.float32)
    torch.manual_seed(arguments.seed)
    model = get_peft_model(llama, lora_config(LORA, "policy"), adapter_name="policy")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    counted, clock, losses = Counted(RowCollator(0)), StepClock(), []
    for step in range(steps):
        batch = counted([rows.train[i] for i in range(step * ROWS, (step + 1) * ROWS)])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        clock.step_ended()
    report(clock, **counted.timed(steps), losses=losses)


def run_trl(arguments: argparse.Namespace, documents: Dataset, steps: int, packing: bool) -> None:
    """TRL's trainer as it is, without activation checkpointing and in float32 like the others."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(arguments.seed)
    recorder = Recorder()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.work / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(arguments.work / "trl"),
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            max_length=LENGTH,
            packing=packing,
            completion_only_loss=True,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=arguments.seed,
        ),
        train_dataset=documents.rename_column("mask", "completion_mask"),
        processing_class=load_tokenizer(arguments.work / "model"),
        peft_config=lora_config(LORA, "default"),
        callbacks=[recorder],
    )
    trainer.data_collator = counted = Counted(trainer.data_collator)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(recorder.clock, **counted.timed(steps), losses=losses)


if __name__ == "__main__":
    main()
