"""One PPO step of a LLaMA with the shape of LLaMA-2 7B: rollout rate, update MFU, time and memory.

    python benchmarks/large_ppo.py [--steps 2] [--out FILE]                        # on one GPU
    python benchmarks/large_ppo.py --width 64 --layers 2 --inner 128 --heads 2 \
        --rows 8 --prompt 16 --new-tokens 8 --dtype float32                        # a dry run

Random weights, made where the process runs; LoRA r=16 on all linear layers; 64 prompts of 256
tokens and 256 new ones, 4 epochs of one minibatch in microbatches of 4. `transformers` samples the
same prompts from the same model with `generate`. MFU is the update's matrix products, without the
adapters' few percent, over the rate of one large product of the same type in this process.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measuring import hardware, ppo_trainer, publish, time_parts
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.model.roles import acting_as, autocast
from chatllama.runtime.distributed import device
from trainers.ppo.data import StopTokens
from trainers.ppo.rewards import Statistics
from trainers.ppo.state import PpoState
from trainers.ppo.train import PpoTrainer

MICROBATCH, EPOCHS, VOCABULARY = 4, 4, 32_000


class Ends(StopTokens):
    """Answers that nobody reads."""

    def decode(self, ids: Any) -> str:
        """Nothing."""
        return ""


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (
        ("width", 4096),
        ("inner", 11008),
        ("layers", 32),
        ("heads", 32),
        ("rows", 64),
        ("prompt", 256),
        ("new-tokens", 256),
        ("steps", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    size = parser.parse_args()
    rows = measure(size)
    where = torch.cuda.get_device_name() if on_gpu() else "CPU"
    lines = [f"{hardware(torch.get_num_threads())}; {where}", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    publish(lines, size.out)


def on_gpu() -> bool:
    """Whether the project computes on a GPU here."""
    return device().type == "cuda"


def seconds() -> float:
    """The time, once all that was asked of the device is done."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_trainer(size: argparse.Namespace, prompts: list[list[int]]) -> PpoTrainer:
    """PPO over four new adapters on random weights."""
    cfg = Config.model_validate(
        {
            "run_dir": "large_ppo_unused",
            "backbone": {
                "path": "random weights",
                "dtype": size.dtype,
                "gradient_checkpointing": size.checkpointing,
            },
            "lora": {"r": 16, "alpha": 32},
            "tracking": {"report_to": []},
            "generation": {"max_new_tokens": size.new_tokens, "batch_size": size.rows},
            "ppo": {
                "steps": size.steps + 1,
                "rollout_batch_size": size.rows,
                "minibatch_size": size.rows,
                "microbatch_size": MICROBATCH,
                "epochs": EPOCHS,
                "score_normalization": "none",
            },
        }
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with device():
            llama = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    nobody: Any = PreTrainedTokenizerFast
    return ppo_trainer(cfg, llama, prompts, Ends(nobody, [], 0))


def matrix_rate(dtype: str) -> float:
    """FLOPs per second of a large product."""
    side = 8192 if on_gpu() else 512
    left = torch.randn(side, side, device=device(), dtype=getattr(torch, dtype))
    product = left @ left
    start, count = seconds(), 20
    for _ in range(count):
        torch.mm(left, left, out=product)
    return 2.0 * side**3 * count / (seconds() - start)


def update_flops(size: argparse.Namespace) -> float:
    """Matrix products of one update: two trunks and the head of the new tokens, both ways."""
    weights = size.layers * (4 * size.width**2 + 3 * size.width * size.inner)
    length = size.prompt + size.new_tokens
    pairs = size.rows * length * (length + 1) // 2
    trunk = 4.0 * weights * size.rows * length + size.layers * 12.0 * size.width * pairs
    head = 4.0 * VOCABULARY * size.width * size.rows * size.new_tokens
    return EPOCHS * (2 * trunk + head)


def measure(size: argparse.Namespace) -> dict[str, str]:
    """The table's rows; the first step warms up."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.rows, size.prompt)
    prompts = torch.randint(1000, VOCABULARY, shape, generator=generator).tolist()
    trainer = make_trainer(size, prompts)
    spent = time_parts(trainer, seconds)
    state = PpoState(0, 0.05, Statistics())
    state, *_ = trainer.advance(state)
    spent.update(dict.fromkeys(spent, 0.0))
    for _ in range(size.steps):
        state, *_ = trainer.advance(state)
    spent = {name: each / size.steps for name, each in spent.items()}
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else float("nan")
    model = trainer.engine.model.eval()
    tokens = torch.tensor(prompts, device=device())
    llama: Any = model.llama
    start = seconds()
    with acting_as(model, "policy"), autocast(model):
        llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            top_k=0,
            max_new_tokens=size.new_tokens,
        )
    theirs = seconds() - start
    new = size.rows * size.new_tokens
    rate = matrix_rate(size.dtype)
    return {
        "seconds per PPO step": f"{sum(spent.values()):.2f}",
        "of which sampling, scoring, update": ", ".join(f"{s:.2f}" for s in spent.values()),
        "rollout, tokens per second": f"{new / spent['sampling']:,.0f}",
        "transformers generate, tokens per second": f"{new / theirs:,.0f}",
        "ratio": f"{theirs / spent['sampling']:.2f}",
        "update MFU": f"{update_flops(size) / spent['update'] / rate:.0%}",
        "matrix product, TFLOP/s": f"{rate / 1e12:.1f}",
        "peak memory, GiB": f"{peak:.1f}",
    }


if __name__ == "__main__":
    main()
