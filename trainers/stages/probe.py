"""`chatllama plan --probe`: three steps of every stage, here, for the rates of a plan."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from chatllama.config.loader import load_config
from chatllama.config.schema import Config
from chatllama.planning.totals import stage_work
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.jsonl import read_lines
from trainers.stages.launcher import Launch
from trainers.stages.pipeline import run_pipeline

STEPS = 3


def probe_rates(config: str, overrides: Sequence[str], gpus: int) -> dict[Stage, float]:
    """Tokens per second of every stage, at full length, over all ranks of this machine.

    The time between the first step and the last counts; the first one warms up. It runs in a
    folder that is removed, with the config's own data.

    Args:
        gpus: ranks.

    Raises:
        ValueError: the config is wrong, or its data cannot be read.
        StageFailed: a stage failed.
    """
    cfg = load_config(config, overrides)
    with tempfile.TemporaryDirectory(prefix="chatllama-probe-") as folder:
        short = [*overrides, f"run_dir={folder}", *_short(cfg)]
        run_pipeline(config, short, launch=Launch(num_gpus=gpus))
        run, probed = RunFolder(Path(folder)), load_config(config, short)
        return {stage: _rate(probed, run, stage) for stage in probed.trained_stages}


def _short(cfg: Config) -> list[str]:
    """Overrides: few steps, no checkpoints, no evaluation; batches and lengths as they are."""
    found = ["evaluation.num_prompts=0", "tracking.report_to=[]", "tracking.log_every=1"]
    if "reward" in cfg.trained_stages:
        found += ["reward.allow_weak=true", "reward.ensemble=1"]
    if "ppo" in cfg.trained_stages:
        found += ["ppo.score_normalization=none", "ppo.critic_warmup_steps=0"]
    found += [
        f"{stage}.{key}"
        for stage in cfg.trained_stages
        for key in (f"steps={STEPS}", "save_every=0")
    ]
    found += [f"{stage}.eval_every=0" for stage in cfg.trained_stages]
    if cfg.backbone.from_scratch is not None:
        found.append(f"backbone.from_scratch.steps={STEPS}")
    if cfg.ppo.health.action == "rollback":
        found.append("ppo.health.action=warn")  # there is no checkpoint to go back to
    return found


def _rate(cfg: Config, run: RunFolder, stage: Stage) -> float:
    times: dict[int, float] = {}
    for line in read_lines(run.metrics(stage)):
        times.setdefault(line["step"], line["time"])  # a closing evaluation has a line of its own
    work = stage_work(cfg, stage, None)
    assert work is not None
    seconds = times[STEPS] - times[1]
    return work.tokens / STEPS * (STEPS - 1) / seconds
