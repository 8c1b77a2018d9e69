"""The figures in the heads of configs/llama-*.yaml: `python tests/config_headers.py [--write]`.

The stages' own code runs at the config's shapes on tensors without numbers, in one process; what
ZeRO makes of it over the config's ranks is `chatllama plan`'s.
"""

import re
import sys
from pathlib import Path
from typing import cast

from fake_runs import extrapolated
from transformers import LlamaConfig

from chatllama.config.loader import load_config
from chatllama.planning.memory import Place, StageMemory, plan_memory
from chatllama.planning.shape import ModelShape
from chatllama.planning.source import find_shape
from chatllama.runs.folder import STAGES, Stage

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RANKS = {"llama-7b-24gb": 1, "llama-3.1-8b-24gb": 1, "llama-3.2-1b-8gb": 1}
RANKS |= {"llama-7b-nf4-12gb": 1, "llama-13b-8gpu-zero2": 8}
RANKS |= {"llama-70b-multinode-zero3": 32}
HEAD = """\
# Peak of tensors on one GPU in GB (1e9 bytes), sequences at full length, from the stages' own code
# at these shapes (tests/config_headers.py; by role and phase: `chatllama plan`):
"""
BLOCK = re.compile(re.escape(HEAD) + r"(#   .*\n)+")


def phases(plan: StageMemory) -> dict[str, float]:
    """Peaks by what a run can tell apart: a pass at the LM head and its backward pass are one."""
    found: dict[str, float] = {}
    for name, peak in plan.peaks.items():
        known = {"LM head": "step", "backward": "step"}.get(name, name.partition(",")[0])
        found[known] = max(found.get(known, 0.0), peak)
    return found


def llama(shape: ModelShape) -> LlamaConfig:
    """What transformers calls the shape."""
    names = LlamaConfig().to_dict().keys() & vars(shape).keys()
    sizes = {name: vars(shape)[name] for name in names}
    return LlamaConfig(**sizes, max_position_embeddings=8192)


def planned(name: str) -> dict[str, float]:
    """`sft step` and the like -> bytes, by the plan."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    shape, place = find_shape(cfg)[0], Place(RANKS[name])
    return {
        f"{stage} {phase}": peak
        for stage in STAGES
        for phase, peak in phases(plan_memory(cfg, shape, place, stage)).items()
    }


def measured(name: str, stages: tuple[Stage, ...] = STAGES) -> dict[str, float]:
    """The same by the code itself, and what the plan says of ZeRO."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    shape = find_shape(cfg)[0]
    found: dict[str, float] = {}
    for stage in stages:
        alone = phases(plan_memory(cfg, shape, Place(1, launched=False), stage))
        together = phases(plan_memory(cfg, shape, Place(RANKS[name]), stage))
        run = extrapolated(cfg, llama(shape), stage)
        for phase in together:
            found[f"{stage} {phase}"] = run.peaks[phase] + together[phase] - alone[phase]
    return found


def block(figures: dict[str, float]) -> str:
    """The lines of a config's head."""
    groups = [
        ", ".join(f"{name} {peak / 1e9:.1f}" for name, peak in figures.items() if stage in name)
        for stage in STAGES
    ]
    return HEAD + f"#   {'; '.join(groups)}\n"


def written(name: str) -> dict[str, float]:
    """The figures in a config's head, in bytes."""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    found = cast(re.Match[str], BLOCK.search(text))[0].removeprefix(HEAD)
    return {
        what: 1e9 * float(size) for what, size in re.findall(r"([a-z]+ [a-z]+) ([\d.]+)", found)
    }


def main(names: list[str], write: bool) -> None:
    for name in names:
        file, new = CONFIGS / f"{name}.yaml", block(measured(name))
        print(name, new.removeprefix(HEAD), sep="\n", flush=True)
        if write:
            text = file.read_text(encoding="utf-8")
            assert BLOCK.search(text), f"{file} has no such lines"
            file.write_text(BLOCK.sub(lambda _, new=new: new, text), encoding="utf-8")


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word != "--write"]
    main(chosen or list(RANKS), "--write" in sys.argv)
