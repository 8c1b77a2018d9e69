"""Speed of the sampler beside transformers' generate, its generate_batch and a plain loop.

    python benchmarks/sampling_speed.py [--rounds 2] [--new-tokens 192] [--threads 1] [--out FILE]

A LLaMA of 15M parameters with random weights, vocabulary 32,000, float32, on the CPU; 64 rows at a
time. All methods run in one process in turn (A B C, A B C, ...), and CPU seconds of all threads are
the unit, so that a busy machine hurts them alike. Cases: `equal`, all responses of one length at
temperature 1; `ragged`, 256 responses that end at random (geometric, mean 64), of which only
tokens up to the end count; `top-p`, .95 at temperature 1, with logits as flat as random weights
give (the nucleus is most of the vocabulary) and ten times as sharp (about as a trained model's).
Each method is called once before, which compiles where it has to: the time is printed, not counted.
The limit is the matrix products of the new tokens at the rate of one large product in this process.
"""

import argparse
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from measuring import (
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Clock,
    gemm_rates,
    hardware,
    llama_config,
    publish,
)
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.runtime.products import use_onednn

ROWS, PROMPT = 64, 64
Answers = list[list[int]]


@dataclass(frozen=True)
class Case:
    """One setting for all methods."""

    num_prompts: int
    new_tokens: int
    top_p: float = 1.0
    mean_length: int | None = None
    """Of responses that end at random. None: all as long as allowed."""
    sharpness: float = 1.0
    """Factor of the logits."""

    @property
    def stops(self) -> list[int]:
        """Ids that end a response: with flat logits, every `mean_length`-th token is one."""
        return list(range(100, 100 + VOCABULARY // self.mean_length)) if self.mean_length else []


def main() -> None:
    """Prints the table, and writes it where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=192, help="longest response")
    parser.add_argument("--num-ragged", type=int, default=256, help="prompts of the ragged case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", help="some of the cases")
    parser.add_argument("--methods", nargs="+", help="some of the methods")
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    new, short = arguments.new_tokens, min(arguments.new_tokens, 64)
    cases = {
        "equal": Case(ROWS, new),
        "ragged": Case(arguments.num_ragged, new, mean_length=64),
        "top-p sharp": Case(ROWS, short, top_p=0.95, sharpness=10.0),
        "top-p flat": Case(ROWS, short, top_p=0.95),
    }
    chosen = {name: cases[name] for name in arguments.cases or cases}
    lines = list(HEADER)
    for name, case in chosen.items():
        lines += measure(name, case, arguments.rounds, arguments.methods or list(METHODS))
    publish([*lines, "", hardware(arguments.threads)], arguments.out)


HEADER = (
    "| case | method | tokens per CPU second | of `generate` | of the limit | mean length |",
    "|---|---|---|---|---|---|",
)


def make_llama(sharpness: float) -> LlamaForCausalLM:
    """The model, its logits multiplied."""
    torch.manual_seed(0)
    config = llama_config(tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
    llama = LlamaForCausalLM(config).eval()
    llama.model.norm.weight.data *= sharpness
    return llama


def ours(llama: LlamaForCausalLM, prompts: Answers, case: Case) -> Answers:
    """This project's sampler."""
    sampling = Sampling(case.new_tokens, top_p=case.top_p)
    uniforms = torch.rand(len(prompts), case.new_tokens)
    return generate(llama, prompts, sampling, case.stops, uniforms, ROWS)


@lru_cache
def slots_of(llama: LlamaForCausalLM) -> StaticKVCache:
    """One for all calls."""
    return StaticKVCache(llama)


def compiled(llama: LlamaForCausalLM, prompts: Answers, case: Case) -> Answers:
    """This project's sampler, its decode step compiled (`generation.compile`)."""
    sampling = Sampling(case.new_tokens, top_p=case.top_p)
    uniforms = torch.rand(len(prompts), case.new_tokens)
    return generate(llama, prompts, sampling, case.stops, uniforms, ROWS, compiled=slots_of(llama))


def settings(case: Case) -> GenerationConfig:
    """The case as transformers puts it."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=case.top_p,
        max_new_tokens=case.new_tokens,
        eos_token_id=case.stops or None,
        pad_token_id=0,
    )


def transformers_generate(llama: Any, prompts: Answers, case: Case) -> Answers:
    """`generate` with its dynamic cache, batch by batch."""
    answers: Answers = []
    for start in range(0, len(prompts), ROWS):
        tokens = torch.tensor(prompts[start : start + ROWS])
        mask = torch.ones_like(tokens)
        out = llama.generate(tokens, attention_mask=mask, generation_config=settings(case))
        answers += out[:, PROMPT:].tolist()
    return answers


def transformers_generate_batch(llama: Any, prompts: Answers, case: Case) -> Answers:
    """`generate_batch`, its continuous batching, with a cache for 64 rows."""
    pages = ROWS * -(-(PROMPT + case.new_tokens) // 256)
    batching = ContinuousBatchingConfig(
        num_blocks=pages + 1, max_batch_tokens=ROWS * PROMPT, max_requests_per_batch=ROWS
    )
    out = llama.generate_batch(
        inputs=prompts, generation_config=settings(case), continuous_batching_config=batching
    )
    return [each.generated_tokens for each in out.values()]


@torch.no_grad()
def plain_loop(llama: LlamaForCausalLM, prompts: Answers, case: Case) -> Answers:
    """The few lines that everybody writes: growing cache, softmax, multinomial."""
    answers: Answers = []
    for start in range(0, len(prompts), ROWS):
        tokens, past, rows = torch.tensor(prompts[start : start + ROWS]), None, []
        stops, live = torch.tensor(case.stops), torch.ones(len(tokens), dtype=torch.bool)
        for _ in range(case.new_tokens):
            out = llama(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            probabilities, past = out.logits[:, -1].softmax(-1), out.past_key_values
            if case.top_p < 1:
                best, ids = probabilities.sort(descending=True)
                best[best.cumsum(-1) - best >= case.top_p] = 0
                tokens = ids.gather(1, torch.multinomial(best, 1))
            else:
                tokens = torch.multinomial(probabilities, 1)
            rows.append(tokens)
            live &= ~torch.isin(tokens[:, 0], stops)
            if not live.any():
                break
        answers += torch.cat(rows, 1).tolist()
    return answers


METHODS: dict[str, Callable[[LlamaForCausalLM, Answers, Case], Answers]] = {
    "ours": ours,
    "compiled": compiled,
    "generate": transformers_generate,
    "generate_batch": transformers_generate_batch,
    "plain loop": plain_loop,
}


def useful(answers: Sequence[Sequence[int]], stops: Sequence[int]) -> int:
    """Tokens up to and including the first stop of each answer."""
    ends, total = set(stops), 0
    for answer in answers:
        places = (i for i, token in enumerate(answer) if token in ends)
        total += next(places, len(answer) - 1) + 1
    return total


def measure(name: str, case: Case, rounds: int, methods: Sequence[str]) -> list[str]:
    """Table rows of one case."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.num_prompts, PROMPT)
    prompts = torch.randint(1000, VOCABULARY, shape, generator=generator).tolist()
    models = {method: make_llama(case.sharpness) for method in methods}
    if "ours" in models:
        use_onednn(models["ours"])  # as loading a backbone does
    small = Case(8, 4, case.top_p, case.mean_length, case.sharpness)
    if "compiled" in methods:  # at its full size from the first call on
        slots_of(models["compiled"]).reserve(ROWS, PROMPT + case.new_tokens)
    for method in methods:
        clock, children = Clock(), resource.getrusage(resource.RUSAGE_CHILDREN)
        METHODS[method](models[method], prompts[:8], small)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall, cpu = clock.read()
        cpu += after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
        print(name, method, f"warm-up: {wall:.0f} s, {cpu:.0f} CPU s (not counted)", flush=True)
    rates: dict[str, list[float]] = {method: [] for method in methods}
    limits: list[float] = []
    length = {method: 0.0 for method in methods}
    for _ in range(rounds):
        limits.append(gemm_rates(0.3)[1])
        for method in methods:
            torch.manual_seed(len(limits))
            clock = Clock()
            count = useful(METHODS[method](models[method], prompts, case), case.stops)
            rates[method].append(count / clock.read()[1])
            length[method] = count / len(prompts)
            print(name, method, f"{rates[method][-1]:.0f}", flush=True)
    weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + VOCABULARY * WIDTH
    limit = statistics.median(limits) / (2.0 * weights)
    base = statistics.median(rates["generate"]) if "generate" in rates else float("nan")
    lines = []
    for method, each in rates.items():
        rate = statistics.median(each)
        lines.append(
            f"| {name} | {method} | {rate:,.0f} | {rate / base:.2f} | {rate / limit:.0%} "
            f"| {length[method]:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
