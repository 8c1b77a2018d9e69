"""How the cost of sampling and of an update grows with length, batch, vocabulary and model width.

    python benchmarks/growth.py [--plot FILE.png] [--out FILE.md]

CPU microseconds per token of one thread, on LLaMAs of 6 layers with random weights and LoRA r=16:
sampling 16 tokens behind a prompt, and one microbatch of policy and value, forward and backward.
One quantity varies, the others stay at 64 tokens, 8 rows, 8,000 pieces and width 288. Dashed:
the matrix products alone, at the rate of one large product in this process.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from measuring import Clock, gemm_rates, hardware, publish
from transformers import LlamaConfig, LlamaForCausalLM

from chatllama.config.model import LoraSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model.roles import Adapter, RoleModel, merged_as
from chatllama.model.scoring import policy_and_value

NEW, LAYERS = 16, 6


@dataclass(frozen=True)
class Size:
    """One point of the curves."""

    length: int = 64
    rows: int = 8
    vocabulary: int = 8_000
    width: int = 288

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return self.width * 8 // 3

    @property
    def trunk(self) -> int:
        """Weights of all layers."""
        return LAYERS * (4 * self.width**2 + 3 * self.width * self.inner)


AXES: dict[str, Sequence[int]] = {
    "length": (32, 64, 128, 256, 512),
    "rows": (2, 4, 8, 16, 32),
    "vocabulary": (1_000, 4_000, 8_000, 16_000, 32_000),
    "width": (144, 288, 432, 576),
}


def main() -> None:
    """Measures, prints the table, draws the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, default=Path("growth.png"))
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(Size(64, 2, 1_000, 144), 1.0)
    rate = gemm_rates(1.0)[1]
    lines = [
        hardware(1),
        "",
        "| axis | value | sampling, us a token | of the limit | update | of the limit |",
    ]
    lines.append("|---|---|---|---|---|---|")
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6), sharey=True)
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        points = [measure(replace(Size(), **{axis: value}), rate) for value in values]
        for value, (sampled, least, updated, fewest) in zip(values, points, strict=True):
            lines.append(
                f"| {axis} | {value:,} | {sampled:,.0f} | {least / sampled:.0%} | {updated:,.0f} "
                f"| {fewest / updated:.0%} |"
            )
            print(lines[-1], flush=True)
        for place, name, colour in ((0, "sampling", "tab:blue"), (2, "update", "tab:orange")):
            panel.plot(values, [p[place] for p in points], "o-", color=colour, label=name)
            panel.plot(values, [p[place + 1] for p in points], "--", color=colour)
        panel.set(xlabel=axis, xscale="log", yscale="log")
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.minorticks_off()
    panels[0].set_ylabel("CPU microseconds a token")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(arguments.plot, dpi=110)
    publish(lines, arguments.out)


def measure(size: Size, rate: float) -> tuple[float, float, float, float]:
    """Microseconds per token: sampling and its matrix products, update and its matrix products."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=LAYERS,
        num_attention_heads=size.width // 48,
        max_position_embeddings=2048,
    )
    trained = Adapter(LoraSection(r=16, alpha=32), trainable=True)
    model = RoleModel(
        LlamaForCausalLM(config), {"policy": trained, "value": trained}, heads=("value",)
    )
    tokens = torch.randint(3, size.vocabulary, (size.rows, size.length))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    response = size.length // 2
    inputs = (tokens, mask, mask[:, response:], 1.0)

    def update() -> None:
        scores, values = policy_and_value(model, *inputs)
        assert values is not None
        (scores.logprobs.sum() + values.sum()).backward()

    def sample(new: int) -> None:
        prompts = tokens[:, : size.length - NEW].tolist()
        with merged_as(model, "policy"):
            generate(model.llama, prompts, Sampling(new), [], torch.rand(size.rows, new), size.rows)

    update()
    clock = Clock()
    update()
    updated = clock.read()[1] / tokens.numel()
    model.eval()
    sample(1)
    clock = Clock()
    sample(NEW)
    with_prompt = clock.read()[1]
    clock = Clock()
    sample(1)
    sampled = (with_prompt - clock.read()[1]) / (size.rows * (NEW - 1))
    head = size.vocabulary * size.width
    pairs = LAYERS * 2 * size.width * size.length  # products with keys and values, per token
    least = 2.0 * (size.trunk + head + pairs) / rate
    # Two trunks forward and backward; the head for half the tokens; attention sees half the pairs.
    fewest = (8.0 * size.trunk + 2.0 * head + 2 * 3 * pairs) / rate
    return tuple(1e6 * each for each in (sampled, least, updated, fewest))  # type: ignore


if __name__ == "__main__":
    main()
