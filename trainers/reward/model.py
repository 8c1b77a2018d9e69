"""The reward model of each ensemble member: seed, run folder, weights, engine, exported adapter."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from chatllama.config.batch_sizes import microbatches_per_step
from chatllama.config.schema import Config
from chatllama.model.adapters import load_adapter, save_adapter
from chatllama.model.backbone import load_backbone
from chatllama.model.fingerprint import check_base
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder, base_path
from chatllama.runtime.distributed import barrier, rank, world_size
from chatllama.text.chat_format import check_contract
from trainers.engine.engine import Engine, ParameterGroup, gathered
from trainers.engine.start import partitioned_loading

SEED_STRIDE = 1_000_003


def member_seed(seed: int, member: int) -> int:
    """The seed of a member's head, dropout and data order; member 0 has the run's own."""
    return seed + SEED_STRIDE * member


def build_reward_model(
    cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast, seed: int
) -> RoleModel:
    """The frozen base with a trainable reward adapter, SFT's where there is one, and a new head.

    Raises:
        ValueError: SFT's adapter is missing, damaged, or made under another chat contract.
    """
    state = None
    if cfg.starts_from_sft:
        sft = load_adapter(run.sft_adapter)
        check_contract(sft.info.get("contract"), tokenizer, cfg.chat, str(run.sft_adapter))
        check_base(cfg, run, sft.info, str(run.sft_adapter))
        state = sft.state
    with partitioned_loading(cfg.deepspeed, cfg.backbone.dtype):
        backbone = load_backbone(cfg.backbone, base_path(cfg, run))
    torch.manual_seed(seed)
    adapter = Adapter(cfg.adapter_lora, state, trainable=True)
    model = RoleModel(backbone, {"reward": adapter}, heads=("reward",), dropout=True)
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build_engine(cfg: Config, model: RoleModel) -> Engine:
    """The optimiser over the reward adapter and its head."""
    section = cfg.reward
    parameters = adapter_parameters(model, "reward") + list(model.heads["reward"].parameters())
    groups = [ParameterGroup("reward", parameters, section.learning_rate)]
    accumulation_steps = microbatches_per_step(section, world_size(), "reward")
    return Engine(model, groups, section, cfg.deepspeed, accumulation_steps)


def export_reward(cfg: Config, folder: Path, model: RoleModel, info: dict[str, object]) -> None:
    """Writes the reward adapter with its head to `folder`; every rank must call."""
    head = dict(model.heads["reward"].named_parameters())
    with gathered([*adapter_parameters(model, "reward"), *head.values()]):
        if rank() == 0:
            save_adapter(folder, adapter_state(model, "reward"), cfg.adapter_lora, info, head)
    barrier()
