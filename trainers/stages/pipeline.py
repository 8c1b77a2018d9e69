"""`chatllama run`: the stages in order, each through the `deepspeed` launcher; then the results.

Which finished stages are kept is decided in `decisions.py`. Command lines come from `launcher.py`,
the report page from `chatllama/reporting/page.py`.
"""

import json
import os
import shlex
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from chatllama.config.batch_sizes import check_batches
from chatllama.config.schema import Config
from chatllama.reporting.summary import print_results, write_summary
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runs.interruption import EXIT_CODE
from chatllama.runs.lock import InUse, lock_path, locked, read_owner, release_all
from chatllama.runs.outcome import Interruption, record_failure
from chatllama.runtime.json_files import read_json
from chatllama.runtime.machine import count_cores
from chatllama.runtime.waiting import doing
from trainers.stages.arguments import load_stage_config, record_config
from trainers.stages.decisions import Decision, decide, forget, saved_steps, set_aside
from trainers.stages.launcher import (
    Launch,
    choose_ranks,
    count_gpus,
    hostfile_slots,
    log_end,
    open_log,
    run_here,
    stage_command,
    stage_environment,
)
from trainers.stages.lineage import made_from
from trainers.stages.processes import run_to_end
from trainers.stages.refusals import load_checked_config

REFUSED = 2
"""Exit code of a stage after a mistake in what the user wrote."""


class StageFailed(Exception):
    """A stage ended without a result.

    Attributes:
        exit_code: of the launcher, never 0; 75 if the stage saved and ended on a signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_pipeline(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    launch: Launch | None = None,
    resume: bool = False,
    redo_from: Stage | None = None,
    only: Collection[Stage] = STAGES,
) -> None:
    """Runs every stage that must run, then writes summary and report and prints the table.

    Args:
        overrides: `section.key=value` each.
        resume: go on from the newest checkpoint of an interrupted stage.
        only: run no other stages than these.
        redo_from: run this stage and the later ones again; their results and checkpoints go.

    Raises:
        ValueError: the config is wrong or does not fit what the run folder holds.
        StageFailed: a stage failed; later ones were not run.
    """
    launch = launch or Launch()
    cfg = load_checked_config(config_path, overrides, only, lambda cfg: _plan_ranks(cfg, launch))
    run = RunFolder(Path(cfg.run_dir))
    # Machines that are started one by one may have run folders of their own.
    given = [str(run.config)] if launch.node_rank is None else [config_path, *overrides]
    # Another machine holds the lock of a shared run folder.
    with locked(run, "run") if launch.leads else nullcontext("") as lock:
        decisions = _chosen(cfg, decide(cfg, run, redo_from, resume), only)
        _check_machines(launch, decisions)
        pending: list[Stage] = [s for s, each in decisions.items() if each.action != "keep"]
        gpus, ranks = _plan_ranks(cfg, launch) if pending else (0, 1)
        for stage, decision in decisions.items():
            _prepare(run, stage, decision, launch)
        if launch.leads:
            record_config(cfg, run)
        cpu_only = not gpus and launch.hostfile is None
        for stage in pending:
            _say(f"{stage}: stage {list(decisions).index(stage) + 1} of {len(decisions)}")
            for old in (run.interrupted(stage), run.failed(stage)):
                old.unlink(missing_ok=True)
            with _told(run, stage) if launch.leads else nullcontext():
                if launch.in_process:
                    run_here(stage, given, resume, lock)
                    continue
                command = stage_command(stage, given, ranks, gpus, launch, resume, lock)
                environment = stage_environment(ranks, count_cores(), cpu_only)
                written = [config_path, *overrides]
                _run_stage(run, stage, command, environment, launch, written)
        if launch.leads:
            write_summary(run)
            print_results(run, _report(run))


@contextmanager
def _told(run: RunFolder, stage: Stage) -> Iterator[None]:
    """Where a stage ends without a result, the page of the run says why."""
    try:
        yield
    except BaseException as error:
        try:
            if isinstance(error, Exception) and not isinstance(error, StageFailed | InUse):
                record_failure(run, stage, str(error), REFUSED if type(error) is ValueError else 1)
            release_all()  # what is locked counts as running
            _say(f"report: {_report(run)}")
        except (ValueError, OSError) as problem:  # the disk may be full
            _say(f"{run.report} was not written: {problem}")
        raise


def _report(run: RunFolder) -> Path:
    """Writes the page of the run."""
    with doing("writing the report"):
        from chatllama.reporting.page import write_report  # brings matplotlib

        return write_report(run)


def _chosen(
    cfg: Config, decisions: Mapping[Stage, Decision], only: Collection[Stage]
) -> dict[Stage, Decision]:
    """The decisions about the stages in `only`; says which stages are left out.

    Raises:
        ValueError: the config lacks one of them, or one starts from another that is not done.
    """
    for stage in STAGES:
        if stage not in decisions and stage in only and only is not STAGES:
            raise ValueError(f"--only {stage}: the config has no {stage}.data")
        if stage not in decisions or stage not in only:
            reason = "--only" if stage in decisions else f"the config has no {stage}.data"
            _say(f"{stage}: left out ({reason})")
    chosen: dict[Stage, Decision] = {s: each for s, each in decisions.items() if s in only}
    for stage, decision in chosen.items():
        for earlier in made_from(cfg, stage) if decision.action != "keep" else ():
            if earlier not in only and decisions[earlier].action != "keep":
                why = "; ".join(decisions[earlier].reasons) or "it has not finished"
                raise ValueError(
                    f"--only: stage {stage} starts from {earlier}, which is to be done ({why}): "
                    f"name {earlier} too"
                )
    return chosen


def finish_run(folder: Path, step: int | None, trust_remote_code: bool = False) -> None:
    """Ends the interrupted stage of a run at a checkpoint: its result, as if `steps` had been that.

    A reward ensemble then consists of the members that have finished and of the one that is ended.

    Args:
        step: of the checkpoint. None: the newest; of an ensemble whose next member has none, the
            finished members alone.
        trust_remote_code: whether the run's own config may allow Python code of the model.

    Raises:
        ValueError: no stage is interrupted, it has no such checkpoint, or the config allows what
            `trust_remote_code` does not.
    """
    run = RunFolder(folder)
    config = str(run.existing_config())
    cfg = load_stage_config(config, ())
    if cfg.backbone.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"{config} lets Python code of the model run (backbone.trust_remote_code). If you "
            "trust whoever wrote it, give --trust-remote-code"
        )
    begun: list[Stage] = [s for s in STAGES if run.was_begun(s) and not run.result(s).is_file()]
    if not begun:
        raise ValueError(f"{folder}: no stage is interrupted with a checkpoint to finish from")
    stage = begun[0]
    overrides = [f"run_dir={json.dumps(str(folder))}"]
    members = run.finished_members() if stage == "reward" else 0
    saved = sorted(saved_steps(run, stage))
    if saved and step is None:
        step = saved[-1]
    if step in saved:
        members += bool(members)
        overrides.append(f"{stage}.steps={step}")
    elif step is not None or not members:
        raise ValueError(
            f"{folder}: stage {stage} cannot be finished at step {step}: it has checkpoints of "
            f"steps {', '.join(map(str, saved)) or 'none'}"
        )
    if stage == "reward" and cfg.reward.ensemble > 1:
        overrides.append(f"reward.ensemble={max(1, members)}")
    run_pipeline(config, overrides, resume=True, only=[stage])


def _check_machines(launch: Launch, decisions: Mapping[Stage, Decision]) -> None:
    """Raises ValueError if machines started one by one would set a stage's old result aside.

    One of them would move what another still reads.
    """
    if launch.node_rank is None:
        return
    for stage, decision in decisions.items():
        if decision.action == "again":
            raise ValueError(
                f"stage {stage} must be done again: {'; '.join(decision.reasons)}. With "
                f"--node-rank say so on every machine: --from {stage}"
            )


def _prepare(run: RunFolder, stage: Stage, decision: Decision, launch: Launch) -> None:
    """Prints the decision about a stage and its reasons, and moves or removes the old result."""
    notes = f" ({'; '.join(decision.notes)})" if decision.notes else ""
    match decision.action:
        case "keep":
            _say(f"{stage}: finished before, kept{notes}")
        case "do":
            _say(f"{stage}: to be done")
        case "go on":
            _say(f"{stage}: goes on from its newest checkpoint{notes}")
        case "prolong":
            _say(
                f"{stage}: is prolonged from its newest checkpoint ({'; '.join(decision.reasons)})"
            )
            run.result(stage).unlink(missing_ok=True)  # what it made stays until it has finished
        case "again":
            _say(f"{stage}: must be done again")
            for reason in decision.reasons:
                _say(f"{stage}:   {reason}")
            _say(f"{stage}:   what it left is kept in {set_aside(run, stage)}")
        case "forget":
            _say(f"{stage}: done again ({decision.reasons[0]}), its result is removed")
            forget(run, stage, with_record=launch.leads)


def _plan_ranks(cfg: Config, launch: Launch) -> tuple[int, int]:
    """GPUs of this machine and processes on it.

    Raises:
        ValueError: the batches do not divide evenly over all machines.
    """
    if launch.in_process:
        check_batches(cfg, 1)
        return 0, 1
    if launch.hostfile is None:
        gpus = count_gpus()
        return gpus, choose_ranks(cfg, launch.num_gpus, gpus, count_cores())
    slots = hostfile_slots(launch.hostfile)
    ranks = launch.num_gpus or max(slots)
    check_batches(cfg, ranks * len(slots) if launch.num_gpus else sum(slots))
    return 0, ranks


def _run_stage(
    run: RunFolder,
    stage: Stage,
    command: list[str],
    environment: dict[str, str],
    launch: Launch,
    written: Sequence[str],
) -> None:
    """Runs one stage; raises StageFailed if it ends without a result.

    Args:
        written: the config file and the overrides that the user gave.
    """
    again = shlex.join(["chatllama", "run", str(run.config), "--resume", *launch.arguments])
    log = open_log(run, stage, command) if launch.hostfile is None else None
    _say(f"{stage}: {f'launcher and libraries write to {log}' if log else shlex.join(command)}")
    try:
        with doing(f"{stage}: starting the processes"):
            code = run_to_end(command, environment, lambda: _request_stop(run, stage), log)
    except (SystemExit, KeyboardInterrupt):
        if not run.interrupted(stage).is_file():
            raise
        code = EXIT_CODE
    if code == 0 and not launch.leads:
        return  # the result may not be visible here yet
    if run.result(stage).is_file():
        if code != 0:
            _say(f"{stage}: the launcher ended with code {code} after the stage had finished")
        return
    if code == EXIT_CODE or run.interrupted(stage).is_file():
        raise StageFailed(f"{_interruption(run, stage)}. To go on:\n  {again}", EXIT_CODE)
    if code == REFUSED:
        afresh = shlex.join(["chatllama", "run", *written, *launch.arguments])
        raise StageFailed(
            f"stage {stage} was refused, for the reason above. Correct {written[0]}, or the file "
            f"that the reason names, and run it again:\n  {afresh}",
            code,
        )
    code = code or 1  # the launcher returns 0 when a signal kills it
    # A rank killed by signal N makes the launcher exit with 256 - N.
    cause = f" (signal {256 - code})" if 224 < code < 256 else ""
    if code == 256 - 9:
        cause = " (killed by signal 9: probably out of memory)"
    record_failure(run, stage, f"its processes ended with exit code {code}{cause}", 1)
    raise StageFailed(
        f"stage {stage} failed with exit code {code}{cause}. {log_end(log)}To go on from its "
        f"newest checkpoint, if there is one, or from its start:\n  {again}",
        code,
    )


def _interruption(run: RunFolder, stage: Stage) -> str:
    """How a signal ended a stage, in words."""
    if not run.interrupted(stage).is_file():
        return f"stage {stage} was interrupted while it made no steps"
    saved = read_json(run.interrupted(stage), Interruption)
    return f"stage {stage} was interrupted ({saved['signal']}) and is saved at step {saved['step']}"


def _request_stop(run: RunFolder, stage: Stage) -> bool:
    """Signals rank 0 to save after its step and to end; False if it is not on this machine."""
    owner = read_owner(lock_path(run, "stage"))
    if owner is None or not owner.is_here or owner.is_gone():
        return False
    os.kill(owner.pid, signal.SIGUSR1)
    _say(f"{stage}: saves after its step and ends; Ctrl-C (again) ends it at once")
    return True


def _say(text: str) -> None:
    print(f"[chatllama] {text}", flush=True)
