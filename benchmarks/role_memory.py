"""Memory of PPO's four roles on one backbone beside four models.

    python benchmarks/role_memory.py [--width 1024] [--layers 8] [--out FILE]

Two processes, one for each way; resident memory grows by what is printed once the models are made
(float32, random weights, LoRA r=16 on all linear layers), and again once they have computed
log-probabilities, values and rewards of 8 sequences of 128 tokens.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from measuring import hardware, publish, run_child
from transformers import LlamaConfig, LlamaForCausalLM

from chatllama.config.model import LoraSection
from chatllama.model.roles import Adapter, RoleModel
from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences

ROLES = ("reference", "policy", "reward", "value")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--child", choices=("roles", "models"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.width, arguments.layers)))
        return
    rows = {}
    for way in ("roles", "models"):
        command = [sys.executable, __file__, "--child", way]
        command += ["--width", arguments.width, "--layers", arguments.layers]
        rows[way] = run_child(command, torch.get_num_threads())
    one = rows["roles"]["backbone"]
    lines = [
        hardware(torch.get_num_threads()),
        "",
        f"One backbone: {one:,.0f} MiB ({rows['roles']['parameters']:,} parameters).",
        "",
        "| way | made, MiB | of one backbone | after scoring, MiB | of one backbone |",
        "|---|---|---|---|---|",
    ]
    for way, name in (("roles", "four roles, one backbone"), ("models", "four models")):
        made, used = rows[way]["made"], rows[way]["used"]
        lines.append(
            f"| {name} | {made:,.0f} | {made / one:.2f} | {used:,.0f} | {used / one:.2f} |"
        )
    publish(lines, arguments.out)


def resident_mib() -> float:
    """Present resident memory of this process, MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def make_llama(width: int, layers: int) -> LlamaForCausalLM:
    """Random weights, vocabulary 32,000."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def measure(way: str, width: int, layers: int) -> dict[str, float]:
    """Memory above that of the libraries, MiB."""
    start, lora = resident_mib(), LoraSection(r=16, alpha=32)
    tokens = torch.randint(3, 32_000, (8, 128))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    inputs = (tokens, mask, mask[:, 64:], 1.0)
    backbone = make_llama(width, layers)
    parameters = sum(p.numel() for p in backbone.parameters())
    if way == "roles":
        models = [
            RoleModel(backbone, {role: Adapter(lora) for role in ROLES}, heads=("reward", "value"))
        ]
    else:
        backbones = [backbone, *(make_llama(width, layers) for _ in range(3))]
        models = [
            RoleModel(each, {role: Adapter(lora)}, heads=(role,) if role in ROLES[2:] else ())
            for each, role in zip(backbones, ROLES, strict=True)
        ]
    made = resident_mib() - start
    with torch.no_grad():
        if way == "roles":
            policy_and_value(models[0], *inputs)
            response_logprobs(models[0], "reference", *inputs)
            score_sequences(models[0], tokens, mask)
        else:
            for model, role in zip(models[:2], ROLES[:2], strict=True):
                response_logprobs(model, role, *inputs)
            for model, role in zip(models[2:], ROLES[2:], strict=True):
                score_sequences(model, tokens, mask, role)
    return {
        "parameters": parameters,
        "backbone": 4 * parameters / 2**20,
        "made": made,
        "used": resident_mib() - start,
    }


if __name__ == "__main__":
    main()
