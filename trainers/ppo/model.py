"""The models of a PPO run: roles built from earlier stages, their engine, the exports."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from chatllama.config.batch_sizes import microbatches_per_step
from chatllama.config.schema import Config
from chatllama.exporting.templates import write_tokenizer
from chatllama.model.adapters import SavedAdapter, load_adapter, save_adapter
from chatllama.model.backbone import load_backbone
from chatllama.model.fingerprint import check_base
from chatllama.model.roles import (
    Adapter,
    Role,
    RoleModel,
    adapter_parameters,
    adapter_state,
    set_head,
)
from chatllama.runs.folder import RunFolder, base_path
from chatllama.runtime.distributed import barrier, rank, world_size
from chatllama.text.chat_format import check_contract
from trainers.engine.engine import Engine, ParameterGroup, gathered
from trainers.engine.start import partitioned_loading
from trainers.ppo.rewards import Scorer
from trainers.ppo.rollout import Rollout


@dataclass(frozen=True)
class Roles:
    """The model with its roles, and how answers are scored."""

    model: RoleModel
    scorer: Scorer


def build_roles(cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast) -> Roles:
    """Policy and value to train, reference and rewards frozen, on one frozen base.

    Without SFT, or after SFT of all weights, the policy starts as an adapter that changes nothing.

    Raises:
        ValueError: an adapter is missing, damaged, or made under another chat contract.
    """
    section = cfg.ppo

    def opened(path: str | Path) -> SavedAdapter:
        saved = load_adapter(Path(path))
        check_contract(saved.info.get("contract"), tokenizer, cfg.chat, str(path))
        check_base(cfg, run, saved.info, str(path))
        return saved

    start = Adapter(cfg.adapter_lora)
    adapters: dict[Role, Adapter] = {}
    if cfg.starts_from_sft:
        sft = opened(run.sft_adapter)
        start = Adapter(sft.lora, sft.state)
    if cfg.starts_from_sft or section.reference_refresh_every:
        adapters["reference"] = start
    if cfg.starts_from_sft and section.reference_refresh_every:
        adapters["sft"] = start  # the reference will be another; results compare with SFT
    adapters["policy"] = Adapter(start.lora, start.state, trainable=True)
    if section.ema_decay is not None:
        adapters["ema"] = start
    heads: dict[Role, torch.Tensor | None] = {}
    members: list[list[Role]] = []
    first: SavedAdapter | None = None
    for reward in section.rewards:
        if reward.adapter is None:
            continue
        members.append([])
        for folder in run.reward_members() if reward.adapter == "run" else [reward.adapter]:
            saved = opened(folder)
            role = f"reward_{len(heads)}" if heads else "reward"
            adapters[role] = Adapter(saved.lora, saved.state)
            heads[role] = saved.head.get("weight")
            members[-1].append(role)
            first = first or saved
    if section.advantage == "gae":
        heads["value"] = torch.zeros(())  # where there is no reward head to copy
        if section.value_model == "adapter":
            source = first or start
            heads["value"] = first.head.get("weight") if first else torch.zeros(())
            adapters["value"] = Adapter(source.lora, source.state, trainable=True)
    with partitioned_loading(cfg.deepspeed, cfg.backbone.dtype):
        backbone = load_backbone(cfg.backbone, base_path(cfg, run))
    torch.manual_seed(cfg.seed)
    shared = {"value": "policy"} if "value" in heads and "value" not in adapters else None
    model = RoleModel(backbone, adapters, heads=tuple(heads), shared=shared)
    if start.state is None:
        _begin_alike(model, {"reference", "ema"} & adapters.keys())
    for role, weight in heads.items():
        set_head(model, role, weight)
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return Roles(model, Scorer(cfg, members))


def _begin_alike(model: RoleModel, roles: Collection[Role]) -> None:
    """Copies the policy's adapter: ones that change nothing differ in one of their two matrices."""
    policy = adapter_state(model, "policy")
    for role in roles:
        for name, tensor in adapter_state(model, role).items():
            tensor.copy_(policy[name])


def build_engine(cfg: Config, model: RoleModel) -> Engine:
    """One optimiser over policy and value, in process or under DeepSpeed."""
    section = cfg.ppo
    groups = [ParameterGroup("policy", adapter_parameters(model, "policy"), section.learning_rate)]
    if "value" in model.heads:
        value = adapter_parameters(model, "value") + list(model.heads["value"].parameters())
        rate = section.value_learning_rate or section.learning_rate
        groups.append(ParameterGroup("value", value, rate))
    accumulation_steps = microbatches_per_step(section, world_size(), "ppo")
    return Engine(model, groups, section, cfg.deepspeed, accumulation_steps, clip_each=True)


def fold_into_value_head(
    engine: Engine, scorer: Scorer, rollout: Rollout, deviation: float
) -> None:
    """Makes the value head, a copy of the first reward adapter's, predict normalised scores.

    Those are (raw score - mean raw score) * the source's weight / deviation.

    Args:
        scorer: with at least one reward adapter.
        deviation: by which scores are divided.
    """
    scale = next(term.weight for term in scorer.terms if term.roles) / deviation
    mean = float(rollout.member_scores[:, 0].double().mean())
    weight, bias = engine.model.heads["value"].parameters()
    engine.assign(weight, engine.whole_value(weight) * scale)
    engine.assign(bias, (engine.whole_value(bias) - mean) * scale)


def export_ppo(
    cfg: Config,
    run: RunFolder,
    model: RoleModel,
    tokenizer: PreTrainedTokenizerFast,
    info: dict[str, object],
) -> None:
    """Writes RUN/ppo/policy, value (with a critic) and policy-ema (if kept); every rank calls."""
    more = partial(write_tokenizer, tokenizer=tokenizer, chat=cfg.chat)

    def export(folder: Path, role: Role, head: nn.Module | None = None) -> None:
        weights = dict(head.named_parameters()) if head is not None else {}
        with gathered([*adapter_parameters(model, role), *weights.values()]):
            if rank() == 0:
                state, lora = adapter_state(model, role), model.lora[role]
                save_adapter(folder, state, lora, info, weights, None if weights else more)

    export(run.policy_adapter, "policy")
    if "ema" in model.adapter_names:
        export(run.ema_adapter, "ema")
    if "value" in model.heads:
        # On the policy's trunk the value model is the policy's adapter with its own head.
        trunk = model.adapter_names["value"] or "value"
        export(run.value_adapter, trunk, model.heads["value"])
    barrier()
