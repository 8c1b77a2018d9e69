"""The state of a PPO run beside weights and optimizer, and its checkpoints."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chatllama.config.schema import Config
from chatllama.model.roles import Role, adapter_parameters, adapter_state
from chatllama.runs.checkpoints import layout_of, save_step
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import rank
from trainers.engine.engine import Engine, gathered
from trainers.ppo.rewards import Statistics


@dataclass(frozen=True)
class PpoState:
    """The state after a step."""

    step: int
    """PPO steps done."""
    kl_coef: float
    """Reward per nat, now."""
    statistics: Statistics
    """Of raw scores, for their normalisation."""
    lr_scale: float = 1.0
    """Factor of all learning rates, lowered by rollbacks."""
    rollbacks: int = 0
    """Rollbacks so far."""
    health: dict[str, Any] = field(default_factory=dict)
    """The health monitor's own state."""


def adapters_that_change(cfg: Config) -> list[Role]:
    """Frozen roles whose weights PPO itself replaces, so that checkpoints must hold them."""
    refreshed: list[Role] = ["reference"] if cfg.ppo.reference_refresh_every else []
    return refreshed + (["ema"] if cfg.ppo.ema_decay is not None else [])


def save_state(cfg: Config, run: RunFolder, engine: Engine, state: PpoState) -> None:
    """Writes the checkpoint of `state`; every rank must call."""

    def write(folder: Path) -> list[str]:
        names = engine.save(folder, asdict(state))
        for role in adapters_that_change(cfg):
            with gathered(adapter_parameters(engine.model, role)):
                if rank() == 0:
                    tensors = adapter_state(engine.model, role)
                    whole = {name: t.cpu().contiguous() for name, t in tensors.items()}
                    save_file(whole, folder / f"{role}.safetensors")
                    names.append(f"{role}.safetensors")
        return names

    limit, layout = cfg.ppo.save_total_limit, layout_of(cfg.deepspeed, cfg.ppo.microbatch_size)
    save_step(run, "ppo", state.step, limit, layout, write)


def load_state(cfg: Config, engine: Engine, checkpoint: Path) -> PpoState:
    """Restores what `save_state` wrote; every rank must call."""
    saved = engine.load(checkpoint)
    for role in adapters_that_change(cfg):
        tensors = load_file(checkpoint / f"{role}.safetensors")
        parameters = adapter_parameters(engine.model, role)
        with torch.no_grad(), gathered(parameters, modified=True):
            for name, tensor in adapter_state(engine.model, role).items():
                tensor.copy_(tensors[name])
    names = ("step", "kl_coef", "lr_scale", "rollbacks", "health")
    known = {name: saved[name] for name in names}
    return PpoState(statistics=Statistics(**saved["statistics"]), **known)
