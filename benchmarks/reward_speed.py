"""Speed and memory of the reward stage beside plain TRL RewardTrainer and a bare torch loop.

    python benchmarks/reward_speed.py TOKENIZER_FOLDER PAIRS_FILE [--steps 5] [--rounds 2]

LoRA r=16 on all linear layers of a 15M LLaMA with random weights, 8 pairs a step of at most 512
tokens each, float32. The pairs are tokenised once and alike for all, and come in the same order
for `ours` and `bare`, whose losses must agree.
"""

import argparse
from pathlib import Path
from typing import Any

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
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from chatllama.config.model import BackboneSection
from chatllama.config.schema import Config, RewardSection
from chatllama.model.roles import Adapter, RoleModel, acting_as, lora_config
from chatllama.text.tokenizer import load_tokenizer
from data.batches import PreferenceCollator, batch_indices

PAIRS, LEARNING_RATE, CENTER = 8, 5e-5, 0.01


def tokenize(records: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Pairs as token ids."""
    from data.tokenize import tokenize

    examples, _ = tokenize(records, "preferences", tokenizer, CHAT, LENGTH)
    return examples.filter(lambda row: len(row["ranks"]) == 2)


def child(arguments: argparse.Namespace, examples: Dataset) -> None:
    """One variant, in this process."""
    if arguments.variant == "trl":
        run_trl(arguments, examples)
        return
    seed, steps = arguments.seed, arguments.steps + 1  # the first warms up
    batches = [batch_indices(len(examples), PAIRS, step, seed) for step in range(steps)]
    run = run_ours if arguments.variant == "ours" else run_bare
    clock, losses = run(arguments, examples, batches)
    shown = [examples[i] for batch in batches[1:] for i in batch]
    report(clock, arguments.steps * PAIRS, _flops(shown, arguments.work), losses)


def _flops(examples: list[dict[str, Any]], work: Path) -> float:
    """Of every answer with its prompt: who shares prompts does less than this."""
    config = LlamaConfig.from_pretrained(work / "model")
    lengths = [len(ids) for row in examples for ids in row["answer_ids"]]
    return training_flops(lengths, 0, config=config)


def run_ours(
    arguments: argparse.Namespace, examples: Dataset, batches: list[list[int]]
) -> tuple[StepClock, list[float]]:
    """Steps of the reward stage, as train_rm.py makes them."""
    from trainers.reward.evaluate import collator_for
    from trainers.reward.model import build_engine
    from trainers.reward.train import optimizer_step

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
    """All answers padded to the longest, each scored at its end, in the loop everybody writes."""
    model, collator = _model(arguments), PreferenceCollator(0)

    def loss_of(batch: list[int]) -> torch.Tensor:
        (tokens, mask), pairs = collator([examples[i] for i in batch])
        with acting_as(model, "reward"):
            hidden = model.llama.model(tokens, mask, use_cache=False).last_hidden_state
        ends = mask.sum(1) - 1
        scores = model.heads["reward"](hidden[torch.arange(len(tokens)), ends])
        better, worse = scores[pairs.better], scores[pairs.worse]
        loss = -torch.nn.functional.logsigmoid(better - worse).mean()
        return loss + CENTER * (better + worse).square().mean()

    return bare_loop(model, LEARNING_RATE, batches, loss_of)


def run_trl(arguments: argparse.Namespace, examples: Dataset) -> None:
    """TRL's trainer."""
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(arguments.seed)  # the score head is drawn
    recorder = Recorder()
    config = lora_config(LORA)
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
            center_rewards_coefficient=CENTER, **trl_settings(arguments, PAIRS, LEARNING_RATE)
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
        for row in seen[PAIRS : (arguments.steps + 1) * PAIRS]
    ]
    report(recorder.clock, len(timed), _flops(timed, arguments.work), logged_losses(trainer))


if __name__ == "__main__":
    compare(__file__, __doc__ or "", ("ours", "trl", "bare"), "preferences", tokenize, child)
