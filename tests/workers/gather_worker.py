"""What tests/engine/test_gathers.py runs on two ranks: what is gathered to write results."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo_runs import TinyRun, tokenizer_of

from chatllama.config.schema import DeepSpeedSection
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import barrier, rank, shut_down
from trainers.engine.engine import gathered
from trainers.engine.start import initialise
from trainers.ppo.model import export_ppo
from trainers.ppo.rewards import Statistics
from trainers.ppo.servers.client import SamplingServer
from trainers.ppo.servers.pool import ServerPool
from trainers.ppo.state import PpoState, save_state
from trainers.reward.model import build_engine, build_reward_model, export_reward
from trainers.sft import model as sft

ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}


class Gathers:
    """Names of the parameters that every `GatheredParameters` receives, by phase."""

    def __init__(self) -> None:
        self.found: dict[str, list[list[str]]] = {}

    @contextmanager
    def during(self, phase: str, model: nn.Module) -> Iterator[None]:
        import deepspeed

        names = {id(p): name for name, p in model.named_parameters()}
        calls = self.found[phase] = []
        original = deepspeed.zero.GatheredParameters

        class Recorded(original):
            def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
                calls.append([names[id(p)] for p in params])
                super().__init__(params, *args, **kwargs)

        deepspeed.zero.GatheredParameters = Recorded
        try:
            yield
        finally:
            deepspeed.zero.GatheredParameters = original


def randomise(parameters: list[nn.Parameter]) -> None:
    """So that nothing is all zero, which an export refuses."""
    with torch.no_grad(), gathered(parameters, modified=True):
        for parameter in parameters:
            parameter.normal_()


def run_ppo(tiny: TinyRun, folder: Path, info: dict[str, object], gathers: Gathers) -> None:
    trainer = tiny.trainer(
        deepspeed=ZERO3, ppo={"ema_decay": 0.5, "reference_refresh_every": 1, "save_every": 1}
    )
    cfg, engine = trainer.cfg, trainer.engine
    with gathers.during("ppo, save", engine.model):
        state = PpoState(step=1, kl_coef=0.1, statistics=Statistics())
        save_state(cfg, RunFolder(folder / "saved"), engine, state)
    with gathers.during("ppo, export", engine.model):
        tokenizer = tokenizer_of(tiny.base)
        export_ppo(cfg, RunFolder(folder / "ppo"), engine.model, tokenizer, info)
    servers = tiny.config(
        generation={"engine": "server", "servers": {"urls": ["http://127.0.0.1:9"]}}
    )
    assert servers.generation.servers is not None
    loaded: list[str] = []
    SamplingServer.load = lambda self, name, folder: loaded.append(folder)
    SamplingServer.unload = lambda self, name: None
    pool = ServerPool(
        servers, servers.generation.servers, RunFolder(folder), engine.model, trainer.stop_tokens
    )
    vars(pool)["_sample_all"] = lambda *_: []
    with gathers.during("servers, publish", engine.model):
        pool.sample("policy", [[70, 71]], (0, 1))
    assert len(loaded) == (rank() == 0)


def run_all(tiny: TinyRun, folder: Path) -> Gathers:
    info = {"base": tiny.base, "contract": {}, "stage": "test"}
    tokenizer, gathers = tokenizer_of(tiny.base), Gathers()
    run_ppo(tiny, folder, info, gathers)

    cfg, run = tiny.config(deepspeed=ZERO3), RunFolder(tiny.folder)
    model = build_reward_model(cfg, run, tokenizer, seed=0)
    build_engine(cfg, model)  # which splits adapters too
    with gathers.during("reward, export", model):
        export_reward(cfg, folder / "reward", model, info)

    model = sft.build_policy(cfg, run)
    sft.build_engine(cfg, model)
    randomise([p for p in model.parameters() if p.requires_grad])
    with gathers.during("sft, export", model):
        sft.export_sft(cfg, RunFolder(folder / "sft-lora"), model, tokenizer, info)

    cfg = tiny.config(deepspeed=ZERO3, lora=None)
    model = sft.build_policy(cfg, run)
    sft.build_engine(cfg, model)
    with gathers.during("sft, export of all weights", model):
        sft.export_sft(cfg, RunFolder(folder / "sft-full"), model, tokenizer, info)
    return gathers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("base")
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    initialise(DeepSpeedSection())
    gathers = run_all(TinyRun(arguments.base, arguments.run), arguments.folder)
    barrier()
    out = arguments.folder / f"gathers-{rank()}.json"
    out.write_text(json.dumps(gathers.found))
    shut_down()


if __name__ == "__main__":
    main()
