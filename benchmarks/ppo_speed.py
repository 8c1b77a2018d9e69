"""PPO end to end beside TRL 1.12's experimental PPOTrainer, the last that TRL had.

    python -m venv trl112 && trl112/bin/pip install trl==1.12.0 peft torch
    python benchmarks/ppo_speed.py --trl-python trl112/bin/python [--rounds 2] [--out FILE]

Both train a LLaMA of 15M parameters with random weights, vocabulary 32,000, float32, LoRA r=16 on
all linear layers, on 32 prompts of 64 tokens a step, 4 epochs of one minibatch of all of them in
microbatches of 8, gradient checkpointing off. TRL's value model has no adapter: it trains whole, as
TRL's interface has it. Cases: `equal`, 64 new tokens always; `ragged`, at most 128, ending at
random (geometric, mean 32), which one raised logit brings about. Every measurement is a process of
its own, in turn (A B A B); parts are in CPU seconds of all threads. Memory is the peak of the
process, of which the libraries alone take the part that is printed beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measuring import (
    VOCABULARY,
    Clock,
    gemm_rates,
    hardware,
    llama_config,
    peak_mib,
    ppo_trainer,
    publish,
    run_child,
    time_parts,
    training_flops,
)
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from trainers.ppo.train import PpoTrainer

MICROBATCH, EPOCHS, PROMPT, STOP = 8, 4, 64, 2
CASES: dict[str, tuple[int, int | None]] = {"equal": (64, None), "ragged": (128, 32)}
"""Longest response, and the mean of those that end at random."""


def main() -> None:
    """Runs the children in turn and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl-python", type=Path, help="of the environment with TRL 1.12")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="responses a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    pythons = {"ours": Path(sys.executable)}
    if arguments.trl_python:
        pythons["trl"] = arguments.trl_python
    settings = f"{arguments.batch} responses a step, {arguments.steps} steps"
    lines = [f"{hardware(arguments.threads)}; {settings}", "", *HEADER]
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as work:
            write_models(Path(work), CASES[case][1])
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
            for _ in range(arguments.rounds):
                for name, python in pythons.items():
                    rows[name].append(launch(python, name, case, arguments, work))
                    print(case, name, json.dumps(rows[name][-1]), flush=True)
        lines += table(case, rows)
    publish(lines, arguments.out)


HEADER = (
    "| case | trainer | samples per second | ratio | per CPU second | ratio "
    "| peak MiB (libraries) | ratio | update's share of the matrix limit "
    "| CPU seconds: sampling, scoring, update | mean length |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def table(case: str, rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians over the rounds."""
    middle = {
        name: {key: statistics.median(row[key] for row in each) for key in each[0]}
        for name, each in rows.items()
    }
    base = middle.get("trl")
    lines = []
    for name, row in middle.items():
        wall, speed = (f"{row[u] / base[u]:.2f}" if base else "-" for u in ("wall", "rate"))
        memory = f"{row['peak'] / base['peak']:.2f}" if base else "-"
        parts, share = "-", "-"
        if name == "ours":
            parts = ", ".join(f"{row[part]:.1f}" for part in ("sampling", "scoring", "update"))
            share = f"{row['share']:.0%}"
        lines.append(
            f"| {case} | {name} | {row['wall']:.2f} | {wall} | {row['rate']:.2f} | {speed} "
            f"| {row['peak']:,.0f} "
            f"({row['libraries']:,.0f}) | {memory} | {share} | {parts} | {row['length']:.0f} |"
        )
    return lines


def launch(
    python: Path, name: str, case: str, arguments: argparse.Namespace, work: str
) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [python, __file__, "--child", name, "--cases", case, "--work", work]
    for option in ("steps", "threads", "batch"):
        command += [f"--{option}", vars(arguments)[option]]
    return run_child(command, arguments.threads)


def write_models(folder: Path, mean_length: int | None) -> None:
    """The LLaMA, and a tokenizer that only decodes answers.

    Coordinate 0 is large and alike in all embeddings; where responses end at random, the stop
    token's row of the (untied) head reads it, so its probability is about 1 / mean_length.
    """
    from chatllama.text.tokenizer import train_tokenizer

    config = llama_config(
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=STOP, pad_token_id=0
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config)
    llama.model.embed_tokens.weight.data[:, 0] = 1.0
    llama.lm_head.weight.data[STOP] = 0.0
    llama.lm_head.weight.data[:, 0] = 0.0
    if mean_length:
        with torch.no_grad():
            hidden = llama.model(torch.randint(1000, VOCABULARY, (8, PROMPT))).last_hidden_state
            weights = llama.lm_head(hidden).exp().sum(-1).mean()
        logit = (weights / mean_length).log()
        llama.lm_head.weight.data[STOP, 0] = logit / hidden[..., 0].mean()
    llama.save_pretrained(folder / "llama")
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)} x" for i in range(600)]
    train_tokenizer(words, 300, folder / "tokenizer")


def child(arguments: argparse.Namespace) -> None:
    """Measures one trainer and prints a row."""
    torch.set_num_threads(arguments.threads)
    (case,) = arguments.cases
    new_tokens, mean_length = CASES[case]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        1000, VOCABULARY, (arguments.batch, PROMPT), generator=generator
    ).tolist()
    run = ours if arguments.child == "ours" else trl
    print(json.dumps(run(arguments.work, prompts, new_tokens, mean_length, arguments.steps)))


def trl(
    work: Path, prompts: list[list[int]], new_tokens: int, mean_length: int | None, steps: int
) -> dict[str, float]:
    """TRL's trainer, all steps of its `train`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")),
        pad_token="t0",
        eos_token=f"t{STOP}",
    )
    libraries = peak_mib()
    folder = str(work / "llama")
    policy = LlamaForCausalLM.from_pretrained(folder)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1) for _ in range(2)
    )
    config = PPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=MICROBATCH,
        gradient_accumulation_steps=len(prompts) // MICROBATCH,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=len(prompts) * steps,
        local_rollout_forward_batch_size=len(prompts),
        response_length=new_tokens,
        stop_token_id=STOP if mean_length else None,
        temperature=1.0,
        learning_rate=1e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        seed=0,
    )
    data = Dataset.from_dict({"input_ids": prompts})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        peft_config=lora,
    )
    clock = Clock()
    trainer.train()
    wall, seconds = clock.read()
    return {
        "rate": len(prompts) * steps / seconds,
        "wall": len(prompts) * steps / wall,
        "peak": peak_mib(),
        "libraries": libraries,
        "length": float(mean_length or new_tokens),
    }


def make_trainer(
    work: Path,
    prompts: list[list[int]],
    new_tokens: int,
    stops: list[int],
    steps: int,
    stage: int = 2,
) -> "PpoTrainer":
    """This project's trainer over the LLaMA of `write_models`, with new adapters for all roles."""
    from chatllama.config.schema import Config
    from chatllama.text.tokenizer import load_tokenizer
    from trainers.ppo.data import StopTokens

    cfg = Config.model_validate(
        {
            "run_dir": str(work / "run"),
            "backbone": {"path": str(work / "llama"), "dtype": "float32"},
            "chat": {"template": "alpaca"},
            "lora": {"r": 16, "alpha": 32},
            "tracking": {"report_to": []},
            "deepspeed": {"stage": stage},
            "generation": {"max_new_tokens": new_tokens, "batch_size": len(prompts)},
            "ppo": {
                "steps": steps,
                "rollout_batch_size": len(prompts),
                "minibatch_size": len(prompts),
                "microbatch_size": MICROBATCH,
                "epochs": EPOCHS,
                "score_normalization": "none",
            },
        }
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM.from_pretrained(work / "llama")
    return ppo_trainer(
        cfg, llama, prompts, StopTokens(load_tokenizer(work / "tokenizer"), stops, 0)
    )


def ours(
    work: Path, prompts: list[list[int]], new_tokens: int, mean_length: int | None, steps: int
) -> dict[str, float]:
    """This project's trainer, step by step, and where its time goes."""
    from trainers.ppo.rewards import Statistics
    from trainers.ppo.state import PpoState

    libraries = peak_mib()
    trainer = make_trainer(work, prompts, new_tokens, [STOP] if mean_length else [], steps)
    spent = time_parts(trainer, time.process_time)
    state, flops, lengths = PpoState(0, 0.05, Statistics()), 0.0, []
    clock = Clock()
    for _ in range(steps):
        state, batch, _, _ = trainer.advance(state)
        tokens = batch.lengths.tolist()
        seen = [PROMPT + length - 1 for length in tokens]
        policy, value = (training_flops(seen, scored, tokens) for scored in (sum(tokens), 0))
        flops += EPOCHS * (policy + value)
        lengths += tokens
    (wall, seconds), peak = clock.read(), peak_mib()
    return {
        "rate": len(prompts) * steps / seconds,
        "wall": len(prompts) * steps / wall,
        "peak": peak,
        "libraries": libraries,
        "length": sum(lengths) / len(lengths),
        "share": flops / spent["update"] / gemm_rates()[1],
        **{name: seconds / steps for name, seconds in spent.items()},
    }


if __name__ == "__main__":
    main()
