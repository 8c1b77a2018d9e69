"""What tests/engine/test_engine.py runs in one process and, through the launcher, on two ranks."""

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch

from chatllama.config.model import BackboneSection, LoraSection
from chatllama.config.schema import DeepSpeedSection
from chatllama.config.stages import StageSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model.backbone import load_backbone
from chatllama.model.roles import (
    Adapter,
    Role,
    RoleModel,
    ScalarHead,
    acting_as,
    adapter_parameters,
)
from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences
from chatllama.runtime.distributed import all_sum, rank, shut_down, world_size
from trainers.engine.engine import Engine, ParameterGroup, gathered
from trainers.engine.start import initialise, partitioned_loading

LORA = LoraSection(r=4, alpha=6.0)
ROLES: tuple[Role, ...] = ("reference", "policy", "reward", "value")
SEQUENCES, MICROBATCH, RESPONSE = 8, 2, 5
PEAKS = (3e-3, 1e-3)
EPS = 1e-4
"""Of Adam, which magnifies how tiny gradients were rounded up to learning rate / eps."""
MAX_GRAD_NORM = 1.0


def deepspeed_section(stage: int) -> DeepSpeedSection:
    return DeepSpeedSection(stage=stage, stage3_param_persistence_threshold=0)


def build(
    base: str,
    *,
    stage: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    microbatch_size: int = MICROBATCH,
    max_grad_norm: float = MAX_GRAD_NORM,
    clip_each: bool = True,
) -> Engine:
    """Four roles with random adapters on the LLaMA in folder `base`, and the engine over them."""
    section = deepspeed_section(stage)
    backbone = BackboneSection.model_validate({"path": base, "dtype": dtype})
    with partitioned_loading(section, dtype):
        llama = load_backbone(backbone, base)
    torch.manual_seed(seed)
    adapters = {role: Adapter(LORA, trainable=role in ("policy", "value")) for role in ROLES}
    model = RoleModel(llama, adapters, heads=("reward", "value"))
    for role in ROLES:
        for parameter in adapter_parameters(model, role):
            parameter.data.normal_(std=0.1)
    value = [*adapter_parameters(model, "value"), *model.heads["value"].parameters()]
    engine = Engine(
        model,
        [
            ParameterGroup("policy", adapter_parameters(model, "policy"), PEAKS[0]),
            ParameterGroup("value", value, PEAKS[1]),
        ],
        StageSection(adam_eps=EPS, weight_decay=0.01, max_grad_norm=max_grad_norm),
        section,
        accumulation_steps=SEQUENCES // microbatch_size // world_size(),
        clip_each=clip_each,
    )
    model.train()
    return engine


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and response mask of 8 sequences, padded on both sides."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (SEQUENCES, 12), generator=generator)
    mask = torch.ones(SEQUENCES, 12, dtype=torch.bool)
    mask[0, :3] = mask[5, :6] = False
    mask[1, -2:] = mask[6, -4:] = False
    return tokens, mask, mask[:, -RESPONSE:]


def step(engine: Engine, number: int) -> tuple[float, float]:
    """One optimizer step on all sequences; its loss, over all ranks, and its gradient norm.

    The policy rests in step 0.
    """
    tokens, mask, response_mask = data()
    size = SEQUENCES // engine.accumulation_steps // world_size()
    count = float(response_mask.sum())
    total = torch.zeros(())
    for i in range(engine.accumulation_steps):
        start = (i * world_size() + rank()) * size
        part = slice(start, start + size)
        arguments = (tokens[part], mask[part], response_mask[part], 0.8)
        with torch.no_grad():
            reference = response_logprobs(engine.model, "reference", *arguments).logprobs
            targets = score_sequences(engine.model, tokens[part], mask[part])
        scores, values = engine(policy_and_value, *arguments)
        kl = scores.logprobs - reference
        error = torch.where(response_mask[part], values - targets[:, None], 0)
        loss = (kl.square().sum() - scores.logprobs.sum() + error.square().sum()) / count
        engine.backward(loss)
        total += loss.detach()
    factor = 1 - number / 10
    norm = engine.step({"policy": factor, "value": factor} if number else {"value": factor})
    return float(all_sum(total)), norm


def weights(engine: Engine, trained: bool) -> dict[str, torch.Tensor]:
    """Copies of the whole trained (or frozen) parameters, on every rank."""
    return {
        name: engine.whole_value(parameter).cpu()
        for name, parameter in engine.model.named_parameters()
        if parameter.requires_grad == trained
    }


def speak(engine: Engine) -> list[list[int]]:
    """Greedy answers of the policy; the ranks answer different prompts."""
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    mine = prompts[rank() :: world_size()]
    engine.model.eval()
    with engine.gathered_model(), acting_as(engine.model, "policy"):
        answers = generate(
            engine.model.llama, mine, Sampling(12, 0.0), [], torch.zeros(len(mine), 12), 4
        )
    engine.model.train()
    return answers


def resumed(
    base: str, stage: int, frozen: dict[str, torch.Tensor], checkpoint: Path
) -> tuple[Engine, dict[str, Any]]:
    """An engine on other adapters than those of `frozen`, and what `checkpoint` makes of it."""
    engine = build(base, stage=stage, seed=99)
    step(engine, 0)  # there is a state already, as at a rollback
    kept = dict(engine.model.named_parameters())
    for name, tensor in frozen.items():
        if "lora_" in name or name.startswith("heads."):
            with torch.no_grad(), gathered([kept[name]], modified=True):
                kept[name].copy_(tensor)
    return engine, engine.load(checkpoint)


def elsewhere(base: str, stage: int, checkpoint: Path) -> dict[str, Any]:
    """Steps 2 to 4 from a checkpoint that another layout wrote; what they end with."""
    frozen = weights(build(base, stage=stage), trained=False)
    engine, state = resumed(base, stage, frozen, checkpoint)
    steps = [step(engine, number) for number in (2, 3, 4)]
    return {"state": state, "steps": steps, "weights": weights(engine, trained=True)}


def run(base: str, folder: Path, stage: int) -> dict[str, Any]:
    """Five steps; the same from a checkpoint after step 2; with checkpointing; in bfloat16."""
    out: dict[str, Any] = {}
    checkpoint = folder / f"checkpoint-{stage}"
    if rank() == 0:
        checkpoint.mkdir(parents=True, exist_ok=True)
    engine = build(base, stage=stage)
    frozen = weights(engine, trained=False)
    bias = cast(ScalarHead, engine.model.heads["value"]).bias
    engine.assign(bias, torch.tensor([0.7]))
    out["assigned"] = float(engine.whole_value(bias))
    steps = [step(engine, 0), step(engine, 1)]
    engine.save(checkpoint, {"step": 2})
    out["answers"] = speak(engine)
    steps += [step(engine, number) for number in (2, 3, 4)]
    out["losses"], out["norms"] = zip(*steps, strict=True)
    out["weights"] = weights(engine, trained=True)
    after = weights(engine, trained=False)
    out["frozen_kept"] = all(torch.equal(after[name], frozen[name]) for name in frozen)
    out["partitioned"] = [p.numel() for p in engine.model.parameters()].count(0) > 0

    again, out["state"] = resumed(base, stage, frozen, checkpoint)
    out["resumed"] = [step(again, number) for number in (2, 3, 4)] == steps[2:]
    own = weights(again, trained=True)
    out["resumed_weights"] = all(torch.equal(own[n], w) for n, w in out["weights"].items())

    again.load(checkpoint)
    again.model.enable_gradient_checkpointing()
    out["checkpointed"] = [step(again, number) for number in (2, 3)]
    if stage >= 2:
        low = build(base, stage=stage, dtype="bfloat16")
        types = {str(p.dtype) for p in low.model.parameters() if not p.requires_grad}
        types_trained = {str(p.dtype) for p in low.model.parameters() if p.requires_grad}
        out["types"] = (sorted(types), sorted(types_trained))
        out["low"] = [step(low, number) for number in range(3)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", type=int)
    parser.add_argument("alone", type=Path)
    arguments = parser.parse_args()
    initialise(DeepSpeedSection())
    out = run(arguments.base, arguments.folder, arguments.stage)
    other = {0: 3, 1: 2, 2: 0, 3: 1}[arguments.stage]
    for name, stage, checkpoint in (
        ("from one process", arguments.stage, arguments.alone),
        ("under another stage", other, arguments.folder / f"checkpoint-{arguments.stage}"),
    ):
        out[name] = elsewhere(arguments.base, stage, checkpoint)
    torch.save(out, arguments.folder / f"out-{arguments.stage}-{rank()}.pt")
    if rank() == 0:
        print(json.dumps({"losses": out["losses"], "norms": out["norms"]}))
    shut_down()


if __name__ == "__main__":
    main()
