"""Speed and memory of the reward stage beside plain TRL RewardTrainer and a bare torch loop.

    python benchmarks/reward_speed.py TOKENIZER_FOLDER PAIRS_FILE [--steps 5] [--rounds 2]

LoRA r=16 on all linear layers of a 15M LLaMA with random weights, 8 pairs a step of at most 512
tokens each, float32. The pairs are tokenised once and alike for all, and come in the same order
for `ours` and `bare`, whose losses must agree.
"""

import argparse
import tempfile
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
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from chatllama.config import (
    BackboneSection,
    ChatSection,
    Config,
    DataSource,
    LoraSection,
    RewardSection,
)
from chatllama.libraries import quiet_libraries
from chatllama.roles import Adapter, RoleModel, lora_config
from chatllama.tokenizer import load_tokenizer, save_tokenizer
from data.collate import PreferenceCollator, batch_indices

PAIRS, LENGTH, LEARNING_RATE, CENTER = 8, 512, 5e-5, 0.01
LORA = LoraSection(r=16, alpha=32)
VARIANTS = ("ours", "trl", "bare")


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
        measure_all(__file__, arguments, Path(folder), "pairs")


def prepare(arguments: argparse.Namespace, work: Path) -> None:
    """The model, its tokenizer, and the pairs as tokens."""
    from data.preferences import tokenize_preferences
    from data.readers import read_source

    disable_progress_bars()
    tokenizer = load_tokenizer(arguments.tokenizer)
    write_llama(work / "model", tokenizer, arguments.seed)
    save_tokenizer(tokenizer, work / "model")
    records, _ = read_source(DataSource(path=str(arguments.data)), "preferences")
    chat = ChatSection(template="llama2")
    examples, _ = tokenize_preferences(records, tokenizer, chat, LENGTH)
    examples.filter(lambda row: len(row["ranks"]) == 2).save_to_disk(work / "examples")


def child(arguments: argparse.Namespace) -> None:
    """One variant, in this process."""
    torch.set_num_threads(arguments.threads)
    examples = cast(Dataset, load_from_disk(arguments.work / "examples"))
    steps = arguments.steps + 1  # the first warms up
    if arguments.variant == "trl":
        run_trl(arguments, examples, steps)
        return
    seed = arguments.seed
    batches = [batch_indices(len(examples), PAIRS, step, seed) for step in range(steps)]
    run = run_ours if arguments.variant == "ours" else run_bare
    clock, losses = run(arguments, examples, batches)
    shown = [examples[i] for batch in batches[1:] for i in batch]
    report(clock, arguments.steps * PAIRS, _flops(shown), losses=losses)


def _flops(examples: list[dict[str, Any]]) -> float:
    """Of every answer with its prompt: who shares prompts does less than this."""
    return training_flops([len(ids) for row in examples for ids in row["answer_ids"]], 0)


def run_ours(
    arguments: argparse.Namespace, examples: Dataset, batches: list[list[int]]
) -> tuple[StepClock, list[float]]:
    """Steps of the reward stage, as train_rm.py makes them."""
    from trainers.reward import build_engine, optimizer_step
    from trainers.reward_scores import collator_for

    cfg = Config(
        run_dir=str(arguments.work / "run"),
        backbone=BackboneSection(path=str(arguments.work / "model"), dtype="float32"),
        lora=LORA,
        reward=RewardSection(
            batch_size=PAIRS,
            microbatch_size=PAIRS,
            max_length=LENGTH,
            learning_rate=LEARNING_RATE,
            center_coef=CENTER,
            adam_betas=[0.9, 0.999],
        ),
    )
    model = _model(arguments)
    engine, collator = build_engine(cfg, model), collator_for(cfg, 0)
    clock, losses = StepClock(), []
    for batch in batches:
        metrics = optimizer_step(cfg, engine, examples, batch, collator, 1.0)
        losses.append(metrics["reward/loss"])
        clock.step_ended()
    return clock, losses


def _model(arguments: argparse.Namespace) -> RoleModel:
    llama = LlamaForCausalLM.from_pretrained(arguments.work / "model", dtype=torch.float32)
    torch.manual_seed(arguments.seed)
    adapter = Adapter(LORA, trainable=True)
    return RoleModel(llama, {"reward": adapter}, heads=("reward",))


def run_bare(
    arguments: argparse.Namespace, examples: Dataset, batches: list[list[int]]
) -> tuple[StepClock, list[float]]:
    """A loop of ten lines: all answers padded to the longest, the loss, backward, AdamW."""
    from chatllama.roles import acting_as

    model = _model(arguments)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    collator, clock, losses = PreferenceCollator(0), StepClock(), []
    for batch in batches:
        (tokens, mask), pairs = collator([examples[i] for i in batch])
        with acting_as(model, "reward"):
            hidden = model.llama.model(tokens, mask, use_cache=False).last_hidden_state
        ends = mask.sum(1) - 1
        scores = model.heads["reward"](hidden[torch.arange(len(tokens)), ends])
        better, worse = scores[pairs.better], scores[pairs.worse]
        loss = -torch.nn.functional.logsigmoid(better - worse).mean()
        loss = loss + CENTER * (better + worse).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        clock.step_ended()
    return clock, losses


def run_trl(arguments: argparse.Namespace, examples: Dataset, steps: int) -> None:
    """TRL's trainer as it is, without activation checkpointing and in float32 like the others."""
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(arguments.seed)  # the score head is drawn
    recorder = Recorder()
    config = lora_config(LORA, "default")
    config.task_type = "SEQ_CLS"
    pairs = examples.map(
        lambda row: {"chosen_ids": row["answer_ids"][0], "rejected_ids": row["answer_ids"][1]},
        remove_columns=examples.column_names,
    )
    seen: list[dict[str, Any]] = []
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            arguments.work / "model", num_labels=1, dtype=torch.float32
        ),
        args=RewardConfig(
            output_dir=str(arguments.work / "trl"),
            max_steps=steps,
            per_device_train_batch_size=PAIRS,
            max_length=LENGTH,
            center_rewards_coefficient=CENTER,
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
        train_dataset=pairs,
        processing_class=load_tokenizer(arguments.work / "model"),
        peft_config=config,
        callbacks=[recorder],
    )
    collator = trainer.data_collator

    def counted(rows: list[dict[str, Any]]) -> Any:
        seen.extend(rows)
        return collator(rows)

    trainer.data_collator = counted
    trainer.train()
    timed = [
        {"answer_ids": [row["chosen_ids"], row["rejected_ids"]]}
        for row in seen[PAIRS : steps * PAIRS]
    ]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(recorder.clock, len(timed), _flops(timed), losses=losses)


if __name__ == "__main__":
    main()
