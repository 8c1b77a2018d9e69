"""Two steps of a stage at LLaMA-2 7B's shapes, random weights: rates, and memory against the plan.

    python benchmarks/large_stages.py [--stage ppo] [--quantization nf4] [--compile]    # on a GPU
    python benchmarks/large_stages.py --width 64 --layers 2 --inner 128 --heads 2 --rows 4 \
        --prompt 16 --new-tokens 8 --dtype float32                                      # dry run

Under the `deepspeed` launcher, with `--zero N`, the engine is ZeRO's. LoRA r=16 on all linear
layers; `--rows` sequences of `--prompt` + `--new-tokens` tokens a step in microbatches of at most
4; in PPO 4 epochs. `transformers` samples the same prompts from the same model with `generate`.
MFU is the update's matrix products, without the adapters' few percent, over the rate of one large
product of the same type in this process; the bandwidth bound of sampling is that of reading all
weights once per token of all rows. Prints one line of JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from measuring import ppo_trainer, time_parts
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.model.backbone import weight_bytes
from chatllama.model.roles import Adapter, RoleModel, sampling_as
from chatllama.planning.memory import plan_memory
from chatllama.planning.shape import read_shape
from chatllama.planning.totals import Work, scoring_passes, stage_work
from chatllama.runs.folder import Stage
from chatllama.runtime.distributed import device, is_launched, shut_down
from chatllama.runtime.products import product, use_onednn
from data.batches import SharedPromptCollator
from trainers.engine.start import initialise
from trainers.ppo.data import StopTokens
from trainers.ppo.rewards import Statistics
from trainers.ppo.state import PpoState
from trainers.reward.model import build_engine as reward_engine
from trainers.reward.train import optimizer_step as reward_step
from trainers.sft.data import RowCollator, Rows
from trainers.sft.model import build_engine as sft_engine
from trainers.sft.train import Trained
from trainers.sft.train import optimizer_step as sft_step
from trainers.stages.memory import here, peak_here

EPOCHS = 4
DEFAULTS = {
    "width": 4096,
    "inner": 11008,
    "layers": 32,
    "heads": 32,
    "rows": 32,
    "prompt": 256,
    "new-tokens": 256,
    "vocabulary": 32_000,
    "key-heads": 0,
}


class Ends(StopTokens):
    """Answers that nobody reads."""

    def decode(self, ids: Any) -> str:
        """Nothing."""
        return ""


def main() -> None:
    """Measures one stage and prints what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stage", default="ppo", choices=("sft", "reward", "ppo"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quantization", default="none", choices=("none", "nf4", "int8"))
    parser.add_argument("--compile", action="store_true", help="compiled decoding steps")
    parser.add_argument("--zero", type=int, default=2, help="stage, under the launcher")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    size = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(size, folder)
        initialise(cfg.deepspeed)
        found = {"sft": measure_sft, "reward": measure_reward, "ppo": measure_ppo}[size.stage](
            size, cfg
        )
    shape = read_shape(llama_config(size).to_dict(), "the benchmark's shape")
    plan = plan_memory(cfg, shape, here(), size.stage)
    found |= {"peak GB": peak_here() / 1e9, "planned GB": plan.peak / 1e9, "in": plan.worst}
    found["parameters"] = shape.parameters
    print(json.dumps(found), flush=True)
    if is_launched():
        shut_down()


def on_gpu() -> bool:
    """Whether the project computes on a GPU here."""
    return device().type == "cuda"


def seconds() -> float:
    """The time, once all that was asked of the device is done; of the CPU all its threads' time."""
    if not on_gpu():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def config(size: argparse.Namespace, folder: str) -> Config:
    """Of all stages; a step is `--rows` sequences."""
    micro = min(4, size.rows)
    batch = {"batch_size": size.rows, "microbatch_size": micro}
    batch["max_length"] = size.prompt + size.new_tokens
    ppo = {"rollout_batch_size": size.rows, "minibatch_size": size.rows, "microbatch_size": micro}
    ppo |= {"steps": 3, "epochs": EPOCHS, "max_prompt_length": size.prompt}
    sampling = {"max_new_tokens": size.new_tokens, "batch_size": size.rows}
    return Config.model_validate(
        {
            "run_dir": folder,
            "backbone": {
                "path": "random weights",
                "dtype": size.dtype,
                "quantization": size.quantization,
                "gradient_checkpointing": True,
            },
            "lora": {"r": 16, "alpha": 32.0},
            "deepspeed": {"stage": size.zero},
            "tracking": {"report_to": []},
            "sft": {**batch, "packing": False},
            "reward": batch,
            "generation": {**sampling, "compile": size.compile},
            "ppo": {**ppo, "score_normalization": "none"},
        }
    )


def llama_config(size: argparse.Namespace) -> LlamaConfig:
    """The shape."""
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads or size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def make_llama(size: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights on the device, quantised where asked."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with device():
            llama = LlamaForCausalLM(llama_config(size))
    finally:
        torch.set_default_dtype(before)
    if size.quantization == "none":
        if size.zero != 3:
            use_onednn(llama)  # as loading a backbone does
        return llama
    with tempfile.TemporaryDirectory() as folder:  # quantised while it is read, as any model
        llama.save_pretrained(folder)
        del llama
        if size.quantization == "int8":
            how = BitsAndBytesConfig(load_in_8bit=True)
        else:
            kind: Any = getattr(torch, size.dtype)
            how = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=kind,
            )
        read = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=getattr(torch, size.dtype), device_map=device()
        )
    return cast(LlamaForCausalLM, read)


def timed_steps(step: Callable[[int], object]) -> float:
    """Seconds of the second of two optimizer steps."""
    step(0)
    start = seconds()
    step(1)
    return seconds() - start


def role_model(size: argparse.Namespace, cfg: Config, stage: Stage) -> RoleModel:
    """The model of SFT or of the reward stage."""
    role = "policy" if stage == "sft" else "reward"
    heads = ("reward",) if stage == "reward" else ()
    adapters = {role: Adapter(cfg.adapter_lora, trainable=True)}
    model = RoleModel(make_llama(size), adapters, heads=heads)
    model.enable_gradient_checkpointing()
    return model.to(device())


def measure_sft(size: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """An SFT step over full rows."""
    length = cfg.sft.max_length
    rows = [{"input_ids": [7] * length, "labels": [7] * length}] * (2 * size.rows)
    engine = sft_engine(cfg, role_model(size, cfg, "sft"))
    low, data = size.dtype == "bfloat16", Rows(cast(Any, rows), None, 2, 1, {})
    trained = Trained(cfg.sft, engine, data, RowCollator(0), low)
    spent = timed_steps(lambda number: sft_step(trained, number, 1.0))
    return speeds(size, spent, size.rows, size.rows * length)


def measure_reward(size: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """A reward step over pairs of which each answer has a full row."""
    length = cfg.reward.max_length
    answers, ranks = [[7] * length, [8] * length], {"ranks": [0, 1], "ratings": [1.0, 0.0]}
    pair = {"answer_ids": answers, "prompt_length": length // 2, **ranks}
    rows, chosen = cast(Any, [pair] * size.rows), list(range(size.rows))
    engine = reward_engine(cfg, role_model(size, cfg, "reward"))
    collator = SharedPromptCollator(0, length)
    spent = timed_steps(lambda _: reward_step(cfg, engine, rows, chosen, collator, 1.0))
    return speeds(size, spent, 2 * size.rows, 0)


def speeds(size: argparse.Namespace, spent: float, rows: int, scored: int) -> dict[str, Any]:
    """Tokens per second, and the share of the matrix rate that the step needs."""
    tokens = rows * (size.prompt + size.new_tokens)
    rate = matrix_rate(size.dtype)
    share = trunk_flops(size, rows) + 4.0 * size.vocabulary * size.width * scored
    return {
        "step s": spent,
        "tokens/s": tokens / spent,
        "MFU": share / spent / rate,
        "TFLOP/s": rate / 1e12,
    }


def matrix_rate(dtype: str) -> float:
    """FLOPs per second of a large product."""
    side = 8192 if on_gpu() else 512
    left = torch.randn(side, side, device=device(), dtype=getattr(torch, dtype))
    product(left, left)
    start, count = seconds(), 20 if on_gpu() else 2
    for _ in range(count):
        product(left, left)
    return 2.0 * side**3 * count / (seconds() - start)


def bandwidth() -> float:
    """Bytes per second of reading memory: of a large copy, which reads and writes."""
    source = torch.zeros(2**30 if on_gpu() else 2**24, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    target.copy_(source)
    start, count = seconds(), 10
    for _ in range(count):
        target.copy_(source)
    return 2.0 * len(source) * count / (seconds() - start)


def trunk_flops(size: argparse.Namespace, rows: int) -> float:
    """Matrix products of one trunk with frozen weights, forward and backward."""
    weights = size.layers * (4 * size.width**2 + 3 * size.width * size.inner)
    length = size.prompt + size.new_tokens
    pairs = rows * length * (length + 1) // 2
    return 4.0 * weights * rows * length + size.layers * 12.0 * size.width * pairs


def measure_ppo(size: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """Two PPO steps after a first one that warms up; then transformers' `generate`."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.rows, size.prompt)
    prompts = torch.randint(1000, size.vocabulary, shape, generator=generator).tolist()
    nobody: Any = PreTrainedTokenizerFast
    trainer = ppo_trainer(cfg, make_llama(size), prompts, Ends(nobody, [], 0))
    spent = time_parts(trainer, seconds)
    state, *_ = trainer.advance(PpoState(0, 0.05, Statistics()))
    spent.update(dict.fromkeys(spent, 0.0))
    for _ in range(2):
        state, *_ = trainer.advance(state)
    spent = {name: each / 2 for name, each in spent.items()}
    model, new = trainer.engine.model.eval(), size.rows * size.new_tokens
    per_token = weight_bytes(model.llama) / bandwidth()
    head = 4.0 * size.vocabulary * size.width * new
    flops = EPOCHS * (2 * trunk_flops(size, size.rows) + head)
    rate, work = matrix_rate(size.dtype), cast(Work, stage_work(cfg, "ppo", None))
    found: dict[str, Any] = {
        "step s": sum(spent.values()),
        **{f"{name} s": each for name, each in spent.items()},
        "rollout tokens/s": new / spent["sampling"],
        "scoring tokens/s": work.scored * scoring_passes(cfg) / cfg.ppo.steps / spent["scoring"],
        "update tokens/s": work.trained / cfg.ppo.steps / spent["update"],
        "bandwidth bound tokens/s": size.rows / per_token,
        "update MFU": flops / spent["update"] / rate,
        "TFLOP/s": rate / 1e12,
    }
    if not trainer.engine.is_zero3():
        theirs = generate_seconds(model, prompts, size.new_tokens)
        found |= {"generate tokens/s": new / theirs, "over generate": theirs / spent["sampling"]}
    return found


def generate_seconds(model: RoleModel, prompts: list[list[int]], new_tokens: int) -> float:
    """Of transformers' sampler, with the same layers."""
    tokens, llama = torch.tensor(prompts, device=device()), cast(Any, model.llama)
    start, mask = seconds(), torch.ones_like(tokens)
    with torch.no_grad(), sampling_as(model, "policy"):
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": new_tokens}
        llama.generate(tokens, attention_mask=mask, **settings)
    return seconds() - start


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
