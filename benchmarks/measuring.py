"""What the benchmarks share: the model, clocks, the machine's limit, child processes, the results.

CPU seconds count all threads. Of this project nothing is imported at the top, since `ppo_speed.py`
also runs where only an old TRL is installed.
"""

import datetime
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from chatllama.config.schema import Config
    from trainers.ppo.data import StopTokens
    from trainers.ppo.train import PpoTrainer

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 32_000, 288, 768, 6, 6


def llama_config(**more: Any) -> LlamaConfig:
    """Of a LLaMA of 15 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        **more,
    )


def training_flops(
    lengths: Sequence[int],
    scored: int,
    read: Sequence[int] | None = None,
    config: LlamaConfig | None = None,
) -> float:
    """Matmul FLOPs that training LoRA adapters on these documents needs, forward and backward.

    The frozen weights' own gradients and the adapters' few percent are not counted; attention
    counts the pairs of positions that see each other.

    Args:
        lengths: tokens of each document.
        scored: positions that go through the LM head.
        read: last positions of each document whose last hidden state is read: of the others the
            last layer needs keys and values only. None: all.
        config: the model's shapes. None: `llama_config()`.
    """
    config = config or llama_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_key_value_heads or config.num_attention_heads
    kept = 2 * width * width * heads // config.num_attention_heads
    layer = 2 * width * width + kept + 3 * width * config.intermediate_size
    flops = layers * _layer_flops(layer, width, lengths)
    flops += 4.0 * config.vocab_size * width * scored
    if read is not None:
        unread = [length - last for length, last in zip(lengths, read, strict=True)]
        flops -= _layer_flops(layer - kept, width, unread)
    return flops


def _layer_flops(weights: int, width: int, lengths: Sequence[int]) -> float:
    """Of products with weights, and of attention: two products, two more each backward."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 4.0 * weights * sum(lengths) + 12.0 * width * pairs


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds by the wall and of the CPU, all threads together."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def gemm_rates(seconds: float = 1.0) -> tuple[float, float]:
    """FLOPs a second and a CPU second of a float32 product, 4096 x 288 x 768, as made here.

    Args:
        seconds: of the CPU, to measure for.
    """
    from chatllama.runtime.products import product

    left, right = torch.randn(4096, WIDTH), torch.randn(INNER, WIDTH).T
    product(left, right)
    clock, count = Clock(), 0
    while clock.read()[1] < seconds:
        product(left, right)
        count += 1
    wall, cpu = clock.read()
    flops = 2.0 * 4096 * WIDTH * INNER * count
    return flops / wall, flops / cpu


def peak_mib() -> int:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also knows the memory of the process that forked this one
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def hardware(threads: int) -> str:
    """Machine, threads, versions and load, for the head of a results file."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "trl", "peft"))
    computing = "1 thread" if threads == 1 else f"{threads} threads"
    return (
        f"{datetime.date.today()}; {model}, {os.cpu_count()} cores, {computing}; load "
        f"{os.getloadavg()[0]:.1f} at the end; {libraries}"
    )


def ppo_trainer(
    cfg: "Config", llama: LlamaForCausalLM, prompts: list[list[int]], ends: "StopTokens"
) -> "PpoTrainer":
    """This project's PPO over a LLaMA with new adapters for all four roles."""
    from datasets import Dataset

    from chatllama.model.roles import Adapter, RoleModel
    from chatllama.runs.folder import RunFolder
    from chatllama.runtime.products import use_onednn
    from trainers.ppo.data import Prompts, prompt_row
    from trainers.ppo.model import build_engine
    from trainers.ppo.rewards import Scorer
    from trainers.ppo.train import PpoTrainer

    use_onednn(llama)  # as loading a backbone does
    adapter, trained = Adapter(cfg.adapter_lora), Adapter(cfg.adapter_lora, trainable=True)
    roles = {"reference": adapter, "policy": trained, "reward": adapter, "value": trained}
    model = RoleModel(llama, roles, heads=("reward", "value"))
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    data = Dataset.from_list([prompt_row(prompt, "") for prompt in prompts])
    engine, scorer = build_engine(cfg, model), Scorer(cfg, [["reward"]])
    run = RunFolder(Path(cfg.run_dir))
    return PpoTrainer(cfg, run, engine, scorer, Prompts(data, data), ends)


def time_parts(trainer: "PpoTrainer", seconds: Callable[[], float]) -> dict[str, float]:
    """Seconds of sampling, scoring and update, which grow while the trainer works.

    Args:
        trainer: whose `advance` will be called; the functions it calls are replaced.
        seconds: the time.
    """
    from trainers.ppo import rollout

    spent = {"sampling": 0.0, "scoring": 0.0, "update": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            start = seconds()
            result = function(*values, **named)
            spent[name] += seconds() - start
            return result

        return call

    rollout.sample_responses = timed("sampling", rollout.sample_responses)
    rollout.score = timed("scoring", rollout.score)
    trainer._update = timed("update", trainer._update)
    return spent


def run_child(command: Iterable[object], threads: int = 1) -> dict[str, Any]:
    """The last line of JSON that a command printed, with this project importable in it.

    Raises:
        RuntimeError: it failed.
    """
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def launcher(ranks: int) -> list[str]:
    """The command that starts a script, named behind it, on some ranks of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [str(deepspeed), "--num_gpus", str(ranks), "--master_port", str(port)]


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Prints lines, and appends them to a file where one is given."""
    text = "\n".join(lines)
    print(text, flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")
