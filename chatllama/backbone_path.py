"""Where the LLaMA that all roles share stands; imports nothing heavy."""

from chatllama.config import BackboneSection, Config
from chatllama.run_folder import RunFolder


def backbone_path(section: BackboneSection, run: RunFolder) -> str:
    """Folder or hub id of the original backbone; RUN/backbone when it was built here."""
    return section.path if section.path is not None else str(run.backbone)


def base_path(cfg: Config, run: RunFolder) -> str:
    """Folder or hub id of the base of the reward and PPO stages.

    The original backbone, or with `lora: null` the fully trained result of SFT.
    """
    return backbone_path(cfg.backbone, run) if cfg.lora is not None else str(run.full_model)
