"""A finished run opened for inference: its backbone once, its adapters as roles."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from chatllama.backbone import backbone_path, base_path, load_backbone
from chatllama.chat_format import check_contract
from chatllama.config import ChatSection, Config
from chatllama.config_loader import load_config
from chatllama.distributed import device
from chatllama.export import load_adapter
from chatllama.libraries import quiet_libraries
from chatllama.roles import Adapter, Role, RoleModel
from chatllama.run_folder import RunFolder
from chatllama.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LoadedRun:
    """Model on its device in eval mode, tokenizer and chat layout of a run."""

    model: RoleModel
    tokenizer: PreTrainedTokenizerFast
    chat: ChatSection
    config: Config


def load_run(run: RunFolder) -> LoadedRun:
    """The run's backbone with every adapter that has been written so far.

    Raises:
        ValueError: not a run folder, no adapter yet, or an adapter that was made under another
            chat contract.
    """
    quiet_libraries()
    if not run.config.is_file():
        raise ValueError(f"{run.root} is no run folder: {run.config} is missing")
    cfg = load_config(run.config)
    tokenizer = load_tokenizer(
        backbone_path(cfg.backbone, run),
        revision=cfg.backbone.revision,
        trust_remote_code=cfg.backbone.trust_remote_code,
    )
    adapters: dict[Role, Adapter] = {}
    heads: dict[Role, dict] = {}
    folders: tuple[tuple[Role, Path], ...] = (
        ("reference", run.sft_adapter),
        ("policy", run.policy_adapter),
        ("reward", run.reward_adapter),
    )
    for role, folder in folders:
        if not folder.is_dir():
            continue
        saved = load_adapter(folder)
        check_contract(saved.info["contract"], tokenizer, cfg.chat, str(folder))
        adapters[role] = Adapter(saved.lora, saved.state)
        if saved.head:
            heads[role] = saved.head
    if not adapters:
        raise ValueError(f"{run.root} holds no adapter yet: has train_sft.py finished?")
    backbone = load_backbone(cfg.backbone, base_path(cfg, run))
    model = RoleModel(backbone, adapters, heads=tuple(heads))
    for role, head in heads.items():
        model.heads[role].load_state_dict(head)
    model.to(device()).eval().requires_grad_(False)
    return LoadedRun(model, tokenizer, cfg.chat, cfg)


def find_tokenizer(cfg: Config) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a config; None where the run would make it and has not yet.

    Raises:
        ValueError: `backbone.path` holds none that can be used.
    """
    quiet_libraries()
    run = RunFolder(Path(cfg.run_dir))
    if cfg.backbone.path is None and not run.backbone.is_dir():
        return None
    return load_tokenizer(
        backbone_path(cfg.backbone, run),
        revision=cfg.backbone.revision,
        trust_remote_code=cfg.backbone.trust_remote_code,
    )
