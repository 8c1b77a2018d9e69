"""`chatllama sweep`: a config under every combination of some values, and all runs compared.

A combination is a run folder of its own, so an interrupted sweep goes on where it was. What comes
before PPO is trained once for all combinations on which it does not depend, and copied.
"""

import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatllama.config.loader import load_config
from chatllama.config.yaml_reader import parse_value
from chatllama.reporting.compare import compare_runs
from chatllama.runs.folder import RunFolder, Stage, read_lineage
from chatllama.runtime.command_line import tell
from chatllama.runtime.files import write_json
from trainers.stages.launcher import count_gpus

LATER = ("ppo.", "generation.", "evaluation.")
"""Keys on which the stages before PPO do not depend begin so."""
BEFORE_PPO: tuple[Stage, ...] = ("sft", "reward")


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    folder: Path
    overrides: tuple[str, ...]
    before_ppo: tuple[str, ...]
    """The overrides that stages before PPO depend on."""

    @property
    def run(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.folder)


def sweep(config: str, words: Sequence[str], one_per_gpu: bool = False) -> Path:
    """Runs every combination and writes the page that compares them; gives its path.

    Args:
        words: `section.key=value` for all runs, `section.key=value,value` for a run each.
        one_per_gpu: a run on each GPU at a time; else one after another, each on all GPUs.

    Raises:
        ValueError: no key has several values, a combination is no valid config (before any is
            run), or one has failed (after all the others).
    """
    runs = combinations(config, words)
    tell(f"{len(runs)} runs below {runs[0].folder.parent}")
    first = {combination.before_ppo: combination for combination in reversed(runs)}
    gpus: queue.Queue[str | None] = queue.Queue()
    for gpu in _gpus() if one_per_gpu else [None]:
        gpus.put(gpu)
    failed: list[str] = []
    for wave in (list(reversed(first.values())), [r for r in runs if r not in first.values()]):
        with ThreadPoolExecutor(gpus.qsize()) as pool:
            done = pool.map(lambda each: _run(config, each, first[each.before_ppo], gpus), wave)
            failed += [r.folder.name for r, ok in zip(wave, done, strict=True) if not ok]
    page = compare_runs([each.folder for each in runs], runs[0].folder.parent / "compare.html")
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. What stopped each is "
            "in its log.txt; the same command goes on with them"
        )
    return page


def combinations(config: str, words: Sequence[str]) -> list[Combination]:
    """Every combination of the values, the last key changing fastest; each is a valid config."""
    keys: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: give section.key=value or section.key=value,value,...")
        keys[key] = _values(text)
    swept = [key for key, values in keys.items() if len(values) > 1]
    if not swept:
        raise ValueError("no key has several values: section.key=value,value,... is a sweep")
    ends = [key.rpartition(".")[2] for key in swept]
    short = dict(zip(swept, ends if len(set(ends)) == len(ends) else swept, strict=True))
    root = Path(load_config(config, [f"{k}={v[0]}" for k, v in keys.items()]).run_dir)
    found: list[Combination] = []
    for values in itertools.product(*keys.values()):
        given = dict(zip(keys, values, strict=True))
        name = ",".join(f"{short[key]}={given[key]}" for key in swept)
        folder = root / re.sub(r"[^\w.,=+-]", "_", name)
        overrides = tuple(f"{key}={value}" for key, value in given.items() if key != "run_dir")
        early = tuple(each for each in overrides if not each.startswith(LATER))
        found.append(Combination(folder, overrides, early))
        load_config(config, [*overrides, f"run_dir={json.dumps(str(folder))}"])
    if len({each.folder for each in found}) < len(found):
        raise ValueError(
            "two combinations would have one folder: their values differ by signs only"
        )
    return found


def _values(text: str) -> list[str]:
    """The values between commas, as YAML each; commas inside brackets and quotes separate none."""
    if text.lstrip().startswith(("[", "{")):
        return [text]
    items = parse_value(f"[{text}]")
    return [text] if len(items) < 2 else [_shown(item) for item in items]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _gpus() -> list[str | None]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES; one None without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count_gpus())]
    return [*names] or [None]


def _run(
    config: str, combination: Combination, first: Combination, gpus: "queue.Queue[str | None]"
) -> bool:
    """Runs a combination to its end in a process of its own; whether it has finished."""
    run, name = combination.run, combination.folder.name
    if run.summary.is_file() and run.result("ppo").is_file():
        tell(f"{name}: finished before")
        return True
    if combination is not first:
        copy_before_ppo(first.run, run)
    run.root.mkdir(parents=True, exist_ok=True)
    gpu = gpus.get()
    where = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    words = [*combination.overrides, f"run_dir={json.dumps(str(run.root))}", "--resume"]
    command = [sys.executable, "-m", "chatllama.cli", "run", config, *words]
    tell(f"{name}: begins; its log is {run.root / 'log.txt'}")
    try:
        with (run.root / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.call(command, stdout=log, stderr=log, env={**os.environ, **where})
    finally:
        gpus.put(gpu)
    tell(f"{name}: {'done' if code == 0 else f'ended with code {code}'}")
    return code == 0


def copy_before_ppo(source: RunFolder, target: RunFolder) -> None:
    """Copies backbone, SFT and reward model of a run, with their records, where they are finished.

    The run that gets them decides by lineage.json, as always, whether they are what it needs.
    """
    stages: list[Stage] = [stage for stage in BEFORE_PPO if source.result(stage).is_file()]
    if target.lineage.is_file() or not stages:
        return
    target.root.mkdir(parents=True, exist_ok=True)
    if source.backbone.is_dir():
        shutil.copytree(source.backbone, target.backbone, dirs_exist_ok=True)
    for stage in stages:
        unneeded = shutil.ignore_patterns("checkpoints", "tensorboard", "wandb*")
        shutil.copytree(
            source.stage(stage), target.stage(stage), ignore=unneeded, dirs_exist_ok=True
        )
    records = read_lineage(source)
    write_json(target.lineage, {stage: records[stage] for stage in stages})
