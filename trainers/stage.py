"""What the beginning and end of every stage have in common."""

from transformers import PreTrainedTokenizerFast

from chatllama import distributed
from chatllama.backbone import backbone_path, base_path
from chatllama.chat_format import describe_contract
from chatllama.config import Config
from chatllama.config_loader import dump_config
from chatllama.distributed import rank
from chatllama.libraries import quiet_libraries
from chatllama.nodes import check_run_folder, copy_to_nodes
from chatllama.run_folder import RunFolder, Stage
from chatllama.run_lock import acquire, release_all
from chatllama.tokenizer import load_tokenizer
from trainers.engine import initialise


def join(run: RunFolder, stage: Stage, lock: str | None) -> None:
    """Locks the run folder, quiets the libraries and meets the other ranks; comes first.

    Args:
        run: its folder is made if it is not there.
        stage: which one begins.
        lock: token of the `chatllama run` that started this process, if one did.

    Raises:
        ValueError: another process works in the run folder.
    """
    if rank() == 0:
        acquire(run, "stage", lock)
        run.interrupted(stage).unlink(missing_ok=True)
    quiet_libraries()
    initialise()


def open_stage(cfg: Config, run: RunFolder) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer; the resolved config is written into the run folder."""
    check_run_folder(cfg, run)
    if rank() == 0:
        dump_config(cfg, run.config)
    return load_tokenizer(
        backbone_path(cfg.backbone, run),
        revision=cfg.backbone.revision,
        trust_remote_code=cfg.backbone.trust_remote_code,
    )


def leave(run: RunFolder, stage: Stage) -> None:
    """Every machine has the results, all ranks part, the run folder is unlocked: comes last."""
    copy_to_nodes(run, run.stage(stage))
    distributed.shut_down()
    release_all()


def adapter_info(
    cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast, stage: Stage
) -> dict[str, object]:
    """What travels with an adapter: its stage, its base and the chat contract."""
    return {
        "stage": stage,
        "base": base_path(cfg, run),
        "contract": describe_contract(tokenizer, cfg.chat),
    }
