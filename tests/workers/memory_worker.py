"""What tests/planning/test_ranks.py runs on two ranks: bytes of tensors, beside the plan's."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from memory_record import MemoryRecord, tensors_of

from chatllama.config.schema import Config
from chatllama.model.backbone import load_backbone
from chatllama.model.roles import Adapter, RoleModel
from chatllama.model.scoring import response_logprobs
from chatllama.planning.memory import plan_memory
from chatllama.planning.source import find_shape
from chatllama.runs.folder import Stage
from chatllama.runtime.distributed import rank, shut_down
from trainers.engine.start import initialise, partitioned_loading
from trainers.ppo.model import build_engine as ppo_engine
from trainers.sft.data import RowCollator, Rows
from trainers.sft.model import build_engine as sft_engine
from trainers.sft.train import Trained, optimizer_step
from trainers.stages.memory import here

LENGTH = 128


def config(base: str, zero: int, full: bool) -> Config:
    sft = {"batch_size": 8, "microbatch_size": 2, "max_length": LENGTH, "packing": False}
    sft |= {"data": [{"path": "-"}]}  # PPO starts from its adapter, which the reference keeps
    ppo: dict[str, Any] = {"advantage": "rloo", "samples_per_prompt": 2, "microbatch_size": 2}
    ppo |= {"rollout_batch_size": 8, "minibatch_size": 8, "max_prompt_length": LENGTH // 2}
    return Config.model_validate(
        {
            "run_dir": base,
            "backbone": {"path": base, "dtype": "float32"},
            "lora": None if full else {"r": 16, "alpha": 32.0},
            "deepspeed": {"stage": zero, "stage3_param_persistence_threshold": 0},
            "sft": sft,
            "ppo": {**ppo, "rewards": [{"function": "builtins:len"}]},
            "generation": {"max_new_tokens": LENGTH // 2, "batch_size": 2},
        }
    )


def full_sft(cfg: Config, model: RoleModel) -> Callable[[], object]:
    engine = sft_engine(cfg, model)
    row = {"input_ids": [5] * LENGTH, "labels": [5] * LENGTH}
    rows = Rows(cast(Any, [row] * 8), None, 1, 1, {})
    trained = Trained(cfg.sft, engine, rows, RowCollator(0), False)
    return lambda: optimizer_step(trained, 0, 1.0)


def adapters(cfg: Config, model: RoleModel) -> Callable[[], object]:
    engine = ppo_engine(cfg, model)
    tokens = torch.randint(3, 90, (2, LENGTH))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def step() -> None:
        model.train()
        for _ in range(engine.accumulation_steps):
            arguments = ("policy", tokens, mask, mask[:, LENGTH // 2 :], 1.0)
            scores = engine(response_logprobs, *arguments)
            engine.backward(scores.logprobs.sum())
            del scores
        engine.step(1.0)

    return step


def measure(base: str, zero: int, full: bool) -> dict[str, float]:
    """Bytes between steps and at most in a step, of this rank and of its plan."""
    cfg, stage = config(base, zero, full), cast(Stage, "sft" if full else "ppo")
    record = MemoryRecord()
    with record:
        with partitioned_loading(cfg.deepspeed, "float32"):
            llama = load_backbone(cfg.backbone, base)
        torch.manual_seed(0)
        lora = cfg.adapter_lora
        roles = {"reference": Adapter(lora), "policy": Adapter(lora, trainable=True)}
        model = RoleModel(llama, {} if full else roles)
        llama.requires_grad_(full)
        if not full:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".policy." in name)
        for tensor in tensors_of(model):
            record.note(tensor)
        step = (full_sft if full else adapters)(cfg, model)
        step()
        step()
        held = record.restart()
        step()
    plan = plan_memory(cfg, find_shape(cfg)[0], here(), stage)
    peaks = [peak for name, peak in plan.peaks.items() if name not in ("rollout", "scoring")]
    return {"held": held, "most": record.most, "planned held": plan.held, "planned": max(peaks)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("zero", type=int)
    arguments = parser.parse_args()
    initialise(config(arguments.base, arguments.zero, False).deepspeed)
    found = {
        name: measure(arguments.base, arguments.zero, full)
        for name, full in (("LoRA", False), ("full", True))
    }
    (arguments.folder / f"{arguments.zero}-{rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
