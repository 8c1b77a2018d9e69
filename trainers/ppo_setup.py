"""What PPO starts from and leaves behind: prompts, the four roles, their engine, the exports."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.backbone import base_path, load_backbone
from chatllama.batching import ppo_batches
from chatllama.chat_format import check_contract, end_of_turn_ids
from chatllama.config import Config
from chatllama.distributed import barrier, rank, world_size
from chatllama.export import load_adapter, save_adapter
from chatllama.roles import Adapter, Role, RoleModel, ScalarHead, adapter_parameters, adapter_state
from chatllama.run_folder import RunFolder
from chatllama.tokenizer import decode
from data.mixture import load_mixture
from data.prompts import tokenize_prompts
from trainers.engine import (
    Engine,
    OptimizerSettings,
    ParameterGroup,
    gathered,
    partitioned_loading,
)


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and how to read the answers."""

    train: Dataset
    held_out: Dataset
    tokenizer: PreTrainedTokenizerFast

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its stop token."""
        return decode(self.tokenizer, ids).strip()


@dataclass(frozen=True)
class TurnEnds:
    """Ids that end a response, and the id that fills."""

    stop_ids: list[int]
    pad_id: int


def turn_ends(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> TurnEnds:
    """The stop and pad ids of the chat contract."""
    assert isinstance(tokenizer.pad_token_id, int)
    return TurnEnds(end_of_turn_ids(tokenizer, cfg.chat), tokenizer.pad_token_id)


def load_prompts(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """Training and held-out prompts, read, split and tokenised as the config says.

    Raises:
        ValueError: bad records, or nothing is left to train on.
    """
    section = cfg.ppo
    mixture = load_mixture(
        section.data, section.eval_data, section.eval_fraction, cfg.seed, "prompts"
    )
    if rank() == 0:
        print(mixture.summary())
    parts = []
    for name, records in (("training", mixture.train), ("held-out", mixture.held_out)):
        tokens, report = records, None
        if len(records):
            tokens, report = tokenize_prompts(
                records, tokenizer, cfg.chat, section.max_prompt_length
            )
        if rank() == 0 and report is not None:
            print(f"{name} prompts: {report.summary()}")
        parts.append(tokens)
    return Prompts(parts[0], parts[1], tokenizer)


def build_roles(cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast) -> RoleModel:
    """Policy and value to train, reference and reward frozen, on one frozen base.

    Raises:
        ValueError: an adapter of an earlier stage is missing, damaged, or made under another chat
            contract.
    """
    reward = load_adapter(run.reward_adapter)
    check_contract(reward.info["contract"], tokenizer, cfg.chat, str(run.reward_adapter))
    adapters: dict[Role, Adapter] = {}
    if cfg.lora is None:
        adapters["policy"] = Adapter(cfg.adapter_lora, None, trainable=True)
    else:
        sft = load_adapter(run.sft_adapter)
        check_contract(sft.info["contract"], tokenizer, cfg.chat, str(run.sft_adapter))
        adapters["reference"] = Adapter(sft.lora, sft.state)
        adapters["policy"] = Adapter(sft.lora, sft.state, trainable=True)
    adapters["reward"] = Adapter(reward.lora, reward.state)
    adapters["value"] = Adapter(reward.lora, reward.state, trainable=True)
    with partitioned_loading(cfg.deepspeed, cfg.backbone.dtype):
        backbone = load_backbone(cfg.backbone, base_path(cfg, run))
    torch.manual_seed(cfg.seed)
    model = RoleModel(backbone, adapters, heads=("reward", "value"))
    with torch.no_grad():
        for head in model.heads.values():
            cast(ScalarHead, head).weight.copy_(reward.head["weight"])
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build_engine(cfg: Config, model: RoleModel) -> Engine:
    """One optimiser over policy and value, in process or under DeepSpeed."""
    section = cfg.ppo
    value = adapter_parameters(model, "value") + list(model.heads["value"].parameters())
    value_rate = section.value_learning_rate or section.learning_rate
    return Engine(
        model,
        [
            ParameterGroup("policy", adapter_parameters(model, "policy"), section.learning_rate),
            ParameterGroup("value", value, value_rate),
        ],
        OptimizerSettings(
            section.adam_betas, section.adam_eps, section.weight_decay, section.max_grad_norm
        ),
        cfg.deepspeed,
        microbatch_size=section.microbatch_size,
        accumulation_steps=ppo_batches(section, world_size()).microbatches,
    )


def export_ppo(cfg: Config, run: RunFolder, model: RoleModel, info: dict[str, object]) -> None:
    """Writes RUN/ppo/policy and RUN/ppo/value; every rank must call."""
    with gathered(list(model.parameters())):
        if rank() == 0:
            lora = cfg.adapter_lora
            save_adapter(run.policy_adapter, adapter_state(model, "policy"), lora, info)
            head = dict(model.heads["value"].named_parameters())
            save_adapter(run.value_adapter, adapter_state(model, "value"), lora, info, head)
    barrier()
