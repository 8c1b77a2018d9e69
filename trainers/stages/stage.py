"""What the beginning and end of every stage have in common."""

from collections.abc import Iterable, Mapping

from transformers import PreTrainedTokenizerFast

from chatllama.config.loader import dump_config
from chatllama.config.schema import Config
from chatllama.model.fingerprint import model_fingerprint
from chatllama.runs.folder import RunFolder, Stage, backbone_path, base_path, write_record
from chatllama.runs.lock import acquire, release_all
from chatllama.runs.replicas import check_run_folder, replicate_file, replicate_folder
from chatllama.runtime import distributed
from chatllama.runtime.distributed import rank
from chatllama.runtime.files import write_json
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.chat_format import describe_contract
from chatllama.text.tokenizer import load_tokenizer
from trainers.engine.engine import initialise
from trainers.stages.decisions import check_resumed, finished_before
from trainers.stages.lineage import finish as complete_record


def has_finished(cfg: Config, run: RunFolder, stage: Stage) -> bool:
    """Whether the stage has finished before, with the same result now; rank 0 prints that it has.

    Raises:
        ValueError: it must run again, which only `chatllama run` does, or it is damaged.
    """
    finished = finished_before(cfg, run, stage)
    if finished:
        print_lines([f"stage {stage} of {run.root} has finished before: {run.result(stage)}"])
    return finished


def print_lines(lines: Iterable[str]) -> None:
    """Prints on rank 0 alone."""
    for line in lines if rank() == 0 else ():
        print(line)


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


def open_stage(cfg: Config, run: RunFolder, stage: Stage) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer; config and lineage are written into the run folder.

    Raises:
        ValueError: the stage has checkpoints that rest on something else.
    """
    check_run_folder(cfg, run)
    if rank() == 0:
        write_record(run, stage, check_resumed(cfg, run, stage))
        dump_config(cfg, run.config)
    return load_tokenizer(
        backbone_path(cfg.backbone, run),
        revision=cfg.backbone.revision,
        trust_remote_code=cfg.backbone.trust_remote_code,
    )


def finish(cfg: Config, run: RunFolder, stage: Stage, numbers: Mapping[str, float]) -> None:
    """Says that a stage is done; every machine has its results, all ranks part, the lock goes.

    Args:
        cfg: the whole config.
        run: whose stage.
        stage: whose results are written.
        numbers: its closing numbers.
    """
    if rank() == 0:
        complete_record(cfg, run, stage)
        write_json(run.result(stage), dict(numbers))
    replicate_file(run.lineage)
    replicate_folder(run, run.stage(stage))
    distributed.shut_down()
    release_all()


def adapter_info(
    cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast, stage: Stage
) -> dict[str, object]:
    """What travels with an adapter: its stage, its base and the chat contract."""
    base = base_path(cfg, run)
    return {
        "stage": stage,
        "base": base,
        "base_fingerprint": model_fingerprint(cfg.backbone, base),
        "contract": describe_contract(tokenizer, cfg.chat),
    }
