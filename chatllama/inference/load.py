"""A run opened for inference: its backbone once, its adapters as roles."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from chatllama.config.loader import load_config
from chatllama.config.model import CODE_NOT_RUN, ChatSection, without_training_kernels
from chatllama.config.schema import Config
from chatllama.inference.folders import OneAdapter, is_run
from chatllama.model.adapters import load_adapter
from chatllama.model.backbone import load_backbone
from chatllama.model.fingerprint import check_base
from chatllama.model.integrity import check_opened, tell_unknown
from chatllama.model.roles import Adapter, Role, RoleModel, set_head
from chatllama.runs.folder import RunFolder, backbone_path, base_path
from chatllama.runtime.command_line import tell
from chatllama.runtime.distributed import device
from chatllama.runtime.gpu import choose_kernels
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.chat_format import check_contract
from chatllama.text.tokenizer import load_tokenizer
from chatllama.text.tokenizer_files import TOKENIZER_CONFIG


@dataclass(frozen=True)
class LoadedRun:
    """Model on its device in eval mode, tokenizer and chat layout of a run."""

    model: RoleModel
    tokenizer: PreTrainedTokenizerFast
    chat: ChatSection
    config: Config
    reward_roles: list[Role]
    """The loaded members of the reward ensemble; empty: nothing can be scored."""


def role_folders(run: RunFolder) -> dict[Role, Path]:
    """The adapters that the run has written so far: reference, policy, ema, reward, reward_1 ..."""
    members = run.reward_members() if run.reward_adapter.is_dir() else []
    folders: dict[Role, Path] = {
        "reference": run.sft_adapter,
        "policy": run.policy_adapter,
        "ema": run.ema_adapter,
        **{reward_role(number): folder for number, folder in enumerate(members)},
    }
    return {role: folder for role, folder in folders.items() if folder.is_dir()}


def reward_role(member: int) -> Role:
    """The role of member 0, 1, ... of the reward ensemble."""
    return f"reward_{member}" if member else "reward"


def load_run(
    run: RunFolder,
    cfg: Config | None = None,
    roles: Sequence[Role] | None = None,
    trust_remote_code: bool = False,
) -> LoadedRun:
    """The run's backbone with its adapters.

    Args:
        cfg: None: the run's own.
        roles: None: all that have adapters. `base`, and `reference` after full fine-tuning, need
            none.
        trust_remote_code: runs Python code that comes with the model. The config's own key does
            not count here: a folder from elsewhere would grant itself that trust.

    Raises:
        ValueError: not a run folder, nothing trained yet, or an adapter that is missing, damaged,
            made under another chat contract or does not fit its base; or a file that is not as
            lineage.json says.
    """
    quiet_libraries()
    choose_kernels()
    cfg = cfg or load_config(run.existing_config())
    folders = role_folders(run)
    if is_run(run) and not folders and not run.full_model.is_dir():
        raise ValueError(f"{run.root} holds no adapter yet: has a stage finished?")
    names = list(folders) if roles is None else _adapted(run, cfg, roles, folders)
    backbone = cfg.backbone.model_copy(update={"trust_remote_code": trust_remote_code})
    cfg = cfg.model_copy(update={"backbone": backbone})
    path = backbone_path(backbone, run)
    tell_unknown(run)
    base_is_here = check_opened(cfg, run)
    with _naming_the_flag(path):
        tokenizer = load_tokenizer(
            path, revision=backbone.revision, trust_remote_code=trust_remote_code
        )
    plain = isinstance(run, OneAdapter) and run.plain
    saved = {role: load_adapter(folders[role], plain) for role in names}
    if plain:
        tokenizer = _beside(tokenizer, run.root)
    for role, adapter in saved.items() if not plain else ():
        check_contract(adapter.info.get("contract"), tokenizer, cfg.chat, str(folders[role]))
        check_base(cfg, run, adapter.info, str(folders[role]))
    rewards = [role for role in names if role.startswith("reward")]
    with _naming_the_flag(path):
        if sys.stderr.isatty():
            tell(f"loading {base_path(cfg, run)} ...")
        llama = load_backbone(without_training_kernels(backbone), base_path(cfg, run))
    if not base_is_here:
        check_opened(cfg, run)
    model = RoleModel(
        llama,
        {role: Adapter(adapter.lora, adapter.state) for role, adapter in saved.items()},
        heads=tuple(rewards),
    )
    for role in rewards:
        set_head(model, role, saved[role].head.get("weight"))
    model.to(device()).eval().requires_grad_(False)
    return LoadedRun(model, tokenizer, cfg.chat, cfg, rewards)


def _adapted(
    run: RunFolder, cfg: Config, roles: Sequence[Role], folders: Mapping[Role, Path]
) -> list[Role]:
    """Those of the roles that have an adapter; ValueError where one lacks it."""
    bare = ("base",) if cfg.lora is not None else ("base", "reference")
    names = [role for role in roles if role not in bare]
    if missing := [role for role in names if role not in folders]:
        raise ValueError(f"{run.root} has no adapter for {missing[0]}; there: {sorted(folders)}")
    return names


def _beside(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    """The base's tokenizer with the chat template beside an adapter of plain PEFT.

    Raises:
        ValueError: the tokenizer that lies there has other ids than the base's.
    """
    unsaid = "that its base has the weights that it was trained on"
    if (folder / TOKENIZER_CONFIG).is_file():
        own = load_tokenizer(folder)
        parts = {"vocabulary": (own.get_vocab(), tokenizer.get_vocab())}
        parts |= {"end of text": (own.eos_token_id, tokenizer.eos_token_id)}
        if wrong := [name for name, (theirs, ours) in parts.items() if theirs != ours]:
            raise ValueError(f"{folder}: its tokenizer has another {wrong[0]} than its base's")
        tokenizer.chat_template = own.chat_template or tokenizer.chat_template
    else:
        unsaid += ", and its chat template: no tokenizer lies there, so the base's is taken"
    tell(f"{folder}: an adapter of plain PEFT; what cannot be checked: {unsaid}")
    return tokenizer


@contextmanager
def _naming_the_flag(path: str) -> Iterator[None]:
    """Says which option allows a model's own code, where training names a key of the config."""
    try:
        yield
    except ValueError as error:
        if CODE_NOT_RUN not in str(error):
            raise
        raise ValueError(
            f"{path} brings Python code of its own, which is not run. If you trust whoever wrote "
            "it, give --trust-remote-code; the key in the run's config does not count here"
        ) from error
