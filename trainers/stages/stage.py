"""The beginning and the end that all stages share; training is in the stages' packages."""

import socket
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from chatllama.config.errors import ConfigError
from chatllama.config.schema import Config
from chatllama.model.backbone import backbone_folder
from chatllama.model.fingerprint import model_fingerprint
from chatllama.model.integrity import base_record
from chatllama.runs.folder import RunFolder, Stage, backbone_path, base_path, write_record
from chatllama.runs.lock import acquire, release_all
from chatllama.runs.replicas import check_run_folder, replicate_file, replicate_folder
from chatllama.runtime import distributed
from chatllama.runtime.distributed import rank
from chatllama.runtime.files import write_json
from chatllama.runtime.gpu import choose_kernels
from chatllama.runtime.lent_terminal import log_apart
from chatllama.runtime.libraries import quiet_libraries
from chatllama.runtime.machine import machines_of_job
from chatllama.runtime.waiting import now_doing
from chatllama.text.chat_format import describe_contract, template_line
from chatllama.text.tokenizer import load_tokenizer
from trainers.engine.start import initialise
from trainers.stages import memory
from trainers.stages.arguments import record_config
from trainers.stages.decisions import check_earlier, check_resumed, finished_before
from trainers.stages.lineage import finish as complete_record
from trainers.stages.refusals import input_problems, model_problems


def has_finished(cfg: Config, run: RunFolder, stage: Stage, resume: bool) -> bool:
    """Whether the stage has finished with results that are still valid; rank 0 prints so.

    With `resume`, one that is to have more steps than it made has not.

    Raises:
        ValueError: the config leaves the stage out; an earlier one that it starts from has not
            finished; it must run again, which only `chatllama run` does; its results are damaged;
            or it cannot start, with every reason that is known before anything is loaded.
    """
    if stage not in cfg.stages:
        raise ValueError(f"the config leaves stage {stage} out: it has no {stage}.data")
    finished = finished_before(cfg, run, stage, resume)
    if finished:
        print_lines([f"stage {stage} of {run.root} has finished before: {run.result(stage)}"])
    else:
        check_earlier(cfg, run, stage)
        problems = input_problems(cfg, [stage], None) or model_problems(cfg) if rank() == 0 else []
        if problems:
            raise ConfigError(f"stage {stage}", problems)
    return finished


def print_lines(lines: Iterable[str]) -> None:
    """Prints on rank 0 alone."""
    for line in lines if rank() == 0 else ():
        print(line)


def join(cfg: Config, run: RunFolder, stage: Stage, lock: str | None) -> None:
    """Locks the run folder, prepares the libraries and joins the other ranks; comes first.

    Args:
        lock: token of the `chatllama run` that started this process, or None.

    Raises:
        ValueError: another process uses the run folder.
    """
    if rank() == 0:
        acquire(run, "stage", lock)
        for old in (run.interrupted(stage), run.failed(stage)):
            old.unlink(missing_ok=True)
    quiet_libraries()
    log_apart(run.log(stage) if distributed.nodes() == 1 else None)
    choose_kernels(cfg.deterministic)
    gpus = distributed.visible_gpus()
    if gpus > 1 and not distributed.is_launched():
        print_lines(
            [f"using one of {gpus} GPUs: `deepspeed` in place of `python` uses all of them"]
        )
    now_doing("joining the other processes")
    initialise(cfg.deepspeed)
    log_apart(None)  # deepspeed was imported
    now_doing(f"{stage}: opening the run folder")


def open_stage(cfg: Config, run: RunFolder, stage: Stage) -> PreTrainedTokenizerFast:
    """Writes config and lineage into the run folder; returns the backbone's tokenizer.

    Raises:
        ValueError: the stage has checkpoints from other settings, data, base or parents, or a
            machine has another base.
    """
    check_run_folder(cfg, run)
    loaded = stage == "sft" or cfg.lora is not None
    if distributed.leads_node() and loaded:  # before it is recorded and compared
        backbone_folder(cfg.backbone, backbone_path(cfg.backbone, run))
    base: dict[str, Any] | None = None
    machines = machines_of_job()
    if rank() == 0:
        record = check_resumed(cfg, run, stage)
        before = record.get("hardware", [])
        hardware = before if before[-1:] == [machines] else [*before, machines]
        write_record(run, stage, record | {"hardware": hardware})
        record_config(cfg, run)
        base = record["base"]
    compare_machines(cfg, run, base)
    print_lines(memory.announcement(cfg, stage) if stage in cfg.trained_stages else ())
    tokenizer = load_tokenizer(
        backbone_path(cfg.backbone, run),
        revision=cfg.backbone.revision,
        trust_remote_code=cfg.backbone.trust_remote_code,
    )
    print_lines([template_line(tokenizer, cfg.chat)])
    print_lines(_where_curves_are(cfg, run, stage))
    now_doing(f"{stage}: reading the data")
    return tokenizer


def _where_curves_are(cfg: Config, run: RunFolder, stage: Stage) -> list[str]:
    lines = [f"metrics: {run.metrics(stage)}"]
    if "tensorboard" in cfg.tracking.report_to:
        lines[0] += f"; curves: tensorboard --logdir {run.root}"
    if "wandb" in cfg.tracking.report_to:
        lines[0] += f"; Weights & Biases: project {cfg.tracking.wandb.project}"
    return lines


def compare_machines(cfg: Config, run: RunFolder, base: Mapping[str, Any] | None) -> None:
    """Compares the base on each machine with that of rank 0's; every rank must call.

    Args:
        base: on rank 0 its `base_record`.

    Raises:
        ValueError: a file of this machine is another: names it.
    """
    if distributed.nodes() == 1:
        return
    first: dict[str, Any] = distributed.from_rank_zero(base)
    if rank() == 0 or not distributed.leads_node():
        return
    own = base_record(cfg, run, fresh=True)
    for name, sha in first["files"].items():
        if own["files"].get(name, sha) != sha:
            raise ValueError(
                f"{own['path']}: {name} on {socket.gethostname()} is not the file that rank 0's "
                "machine has: one of them was changed or damaged. Copy it again"
            )
    if own["fingerprint"] and first["fingerprint"] not in (None, own["fingerprint"]):
        raise ValueError(f"{own['path']} on {socket.gethostname()} has other weights than rank 0's")


def finish(cfg: Config, run: RunFolder, stage: Stage, numbers: Mapping[str, float]) -> None:
    """Records that a stage is finished, copies its results to all machines and frees the lock."""
    print_lines([memory.actual(cfg, stage)] if stage in cfg.trained_stages else ())
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
    """Content of an adapter's chatllama.json: its stage, its base and the chat contract."""
    base = base_path(cfg, run)
    return {
        "stage": stage,
        "base": base,
        "base_fingerprint": model_fingerprint(cfg.backbone, base),
        "contract": describe_contract(tokenizer, cfg.chat),
    }
