"""The sampler beside transformers' `generate` on a real shape of many thin layers, SmolLM2-135M's.

    python benchmarks/thin_layers.py [--batches 1 16 64] [--rounds 2] [--new-tokens 32]

Random weights in float32, one thread, prompts of 32 tokens, all responses equally long; methods
take turns, and CPU seconds are the unit. Products are those of the new tokens alone, with the same
matrices and as many rows, as this project multiplies here (`chatllama/runtime/products.py`): what a
sampler without attention, norms and Python would take. `generate` has torch's own products.
"""

import argparse
import copy
import statistics
from typing import Any

import torch
from measuring import Clock, hardware
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.planning.published import published_shape
from chatllama.runtime.products import use_onednn

PROMPT = 32
NAME = "HuggingFaceTB/SmolLM2-135M"


def main() -> None:
    """Prints a row for each batch and temperature."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    llama, new = make_llama(), arguments.new_tokens
    fast = copy.deepcopy(llama, {id(weight): weight for weight in llama.parameters()})
    use_onednn(fast)
    print("| rows | temperature | ours | `generate` | ratio | decoding, of its products |")
    print("|---|---|---|---|---|---|", flush=True)
    for rows in arguments.batches:
        prompts = torch.randint(1000, 40_000, (rows, PROMPT)).tolist()
        for temperature in arguments.temperatures:
            spent: dict[str, list[float]] = {"ours": [], "theirs": [], "prompts": []}
            products = []
            for _ in range(arguments.rounds + 1):  # the first warms up
                for name in spent:
                    clock = Clock()
                    if name == "theirs":
                        sample_theirs(llama, prompts, temperature, new)
                    else:
                        sample_ours(fast, prompts, temperature, new if name == "ours" else 1)
                    spent[name].append(clock.read()[1])
                clock = Clock()
                multiply(fast, rows, new - 1)
                products.append(clock.read()[1])
            ours, theirs, first = (statistics.median(times[1:]) for times in spent.values())
            share = statistics.median(products[1:]) / (ours - first)
            print(
                f"| {rows} | {temperature:g} | {rows * new / ours:.1f} | "
                f"{rows * new / theirs:.1f} | {theirs / ours:.2f} | {share:.0%} |",
                flush=True,
            )
    print(hardware(1))


def make_llama() -> LlamaForCausalLM:
    """Random weights."""
    shape: Any = published_shape(NAME)
    names = LlamaConfig().to_dict().keys() & vars(shape).keys()
    sizes = {name: vars(shape)[name] for name in names}
    config = LlamaConfig(**sizes, eos_token_id=None, pad_token_id=0, max_position_embeddings=2048)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def sample_ours(llama: Any, prompts: list[list[int]], temperature: float, new: int) -> None:
    """This project's sampler."""
    uniforms = torch.rand(len(prompts), new)
    generate(llama, prompts, Sampling(new, temperature), [], uniforms, len(prompts))


def sample_theirs(llama: Any, prompts: list[list[int]], temperature: float, new: int) -> None:
    """That of transformers."""
    sampled = {"temperature": temperature, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        do_sample=bool(temperature), max_new_tokens=new, pad_token_id=0, **sampled
    )
    tokens = torch.tensor(prompts)
    mask = torch.ones_like(tokens)
    llama.generate(tokens, attention_mask=mask, generation_config=settings)


@torch.no_grad()
def multiply(llama: LlamaForCausalLM, rows: int, steps: int) -> None:
    """The products of some decoding steps."""
    layers = [m for m in llama.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}
    for _ in range(steps):
        for layer in layers:
            layer(inputs[layer.in_features])


if __name__ == "__main__":
    main()
