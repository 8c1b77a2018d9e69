"""Many clients at once against one at a time: `chatllama serve` through OpenAI's own client.

Starts the server as a process of its own, asks every prompt greedily with streaming, once alone
and once with all clients together, A B A B, and compares every answer. Prints a Markdown table.

    python benchmarks/serve_concurrency.py RUN --clients 64
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from openai import AsyncOpenAI

PROMPTS = Path(__file__).resolve().parent.parent / (
    "data/samples/garden_notes/heldout_prompts.jsonl"
)


def start(run: str, rows: int) -> tuple[subprocess.Popen[str], str]:
    """A server of the run and its address."""
    command = [sys.executable, "-m", "chatllama.cli", "serve", run, "--port", "0"]
    words = [*command, "--max-concurrency", str(rows)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"http://\S+", line):
            return process, found.group()
    raise SystemExit("the server did not start")


async def ask(
    client: AsyncOpenAI, model: str, prompt: str, max_tokens: int
) -> tuple[str, int, float]:
    """Text, tokens and seconds to the first token of one streamed answer."""
    started, first, text, count = time.perf_counter(), 0.0, "", 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
        elif chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
    return text, count, first


async def measure(url: str, model: str, prompts: list[str], max_tokens: int, rounds: int) -> None:
    """Prints the table."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600)
    await ask(client, model, prompts[0], 4)
    print("| round | clients | tokens | seconds | tokens/s | median s to first token |")
    print("|---|---|---|---|---|---|")
    rates: dict[str, list[float]] = {"alone": [], "together": []}
    answers: dict[str, list[str]] = {}
    for number in range(rounds):
        for name in ("alone", "together"):
            started = time.perf_counter()
            if name == "alone":
                told = [await ask(client, model, prompt, max_tokens) for prompt in prompts]
            else:
                told = await asyncio.gather(
                    *(ask(client, model, prompt, max_tokens) for prompt in prompts)
                )
            seconds = time.perf_counter() - started
            tokens = sum(count for _, count, _ in told)
            rates[name].append(tokens / seconds)
            first = sorted(first for _, _, first in told)[len(told) // 2]
            clients = 1 if name == "alone" else len(prompts)
            row = f"{number + 1} | {clients} | {tokens} | {seconds:.1f} | {tokens / seconds:.0f}"
            print(f"| {row} | {first:.3f} |", flush=True)
            answers[name] = [text for text, _, _ in told]
    ratios = [b / a for a, b in zip(rates["alone"], rates["together"], strict=True)]
    equal = sum(a == b for a, b in zip(answers["alone"], answers["together"], strict=True))
    print(f"\n{equal} of {len(prompts)} answers equal those given alone; together ", end="")
    print(" and ".join(f"{ratio:.1f}" for ratio in ratios) + " times as fast as one at a time.")
    if equal < len(prompts):
        raise SystemExit(1)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--model", default="policy")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: arguments.clients]
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == arguments.clients, f"only {len(prompts)} prompts"
    process, url = start(arguments.run, arguments.clients)
    print(f"{os.cpu_count()} cores, {arguments.model} of {Path(arguments.run).name}\n")
    try:
        asyncio.run(measure(url, arguments.model, prompts, arguments.max_tokens, arguments.rounds))
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
