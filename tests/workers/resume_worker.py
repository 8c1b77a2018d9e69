"""What tests/engine/test_resume.py runs through the launcher on two ranks.

SFT, reward model and PPO under ZeRO 0, 2 and 3: each without interruption, and each told to stop
by a signal to one rank alone, then resumed; and what one process left, resumed under ZeRO-3. All
in one process, since starting one takes longer.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kills.run import MAINS

from chatllama.runs import interruption
from chatllama.runs.checkpoints import step_folders
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runtime import distributed
from chatllama.runtime.distributed import barrier, rank, shut_down, world_size

TRAINED: dict[str, tuple[str, tuple[Stage, ...]]] = {
    "adapters": ("lora.dropout=0", STAGES),
    "all weights": ("lora=null", ("sft",)),
}
"""What goes on elsewhere: settings without dropout, which ranks draw for themselves, and stages."""
STOP_AFTER: dict[Stage, int] = {"sft": 2, "reward": 3, "ppo": 1}
SETTINGS = ["sft.steps=4", "reward.steps=4", "ppo.steps=3", "reward.save_every=0",
            "sft.save_every=0", "ppo.save_every=0"]  # fmt: skip


def train(stage: Stage, command: Sequence[str]) -> None:
    """One stage; the process can do another after it."""
    interruption.listen()
    try:
        MAINS[stage](list(command))
    finally:
        gc.collect()
        barrier()


def train_interrupted(stage: Stage, command: Sequence[str]) -> None:
    """The same, with a signal to the last rank in the middle."""
    asked, original = [0], interruption.stop_requested

    def counting() -> bool:
        asked[0] += 1
        if asked[0] == STOP_AFTER[stage] and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original()

    interruption.stop_requested = counting
    try:
        train(stage, command)
        raise AssertionError(f"{stage} was not interrupted")
    except interruption.Interrupted:
        pass
    finally:
        interruption.stop_requested = original
        barrier()


def hashes(run: RunFolder, stage: Stage) -> dict[str, str]:
    files = sorted(run.stage(stage).glob("*/adapter_model.safetensors"))
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def zero_settings(zero: int) -> list[str]:
    """So that ZeRO-3 splits even the smallest tensor."""
    return [f"deepspeed.stage={zero}", "deepspeed.stage3_param_persistence_threshold=0"]


def leave(run: RunFolder, stage: Stage, left: Path) -> None:
    """Keeps a copy of a run whose stage was interrupted, for another layout to go on with."""
    if rank() == 0:
        shutil.copytree(run.root, left / stage, ignore=shutil.ignore_patterns(".lock-*"))
    barrier()


def compare(folder: Path, config: str, zero: int) -> dict[str, dict[str, Any]]:
    """Both ways through the three stages under a ZeRO stage."""
    whole, cut = (RunFolder(folder / f"{name}-{zero}") for name in ("whole", "cut"))
    common = [config, *SETTINGS, *zero_settings(zero)]
    if zero == 2:
        common.append(TRAINED["adapters"][0])
    found = {}
    for stage in STAGES:
        train(stage, [*common, f"run_dir={whole.root}"])
        command = [*common, f"run_dir={cut.root}"]
        train_interrupted(stage, command)
        if zero == 2:
            leave(cut, stage, folder / "left by two" / "adapters")
        told = json.loads(cut.interrupted(stage).read_text())
        saved = [path.name for path in step_folders(cut.checkpoints(stage))]
        train(stage, [*command, "--resume"])
        found[stage] = {
            "whole": hashes(whole, stage),
            "cut": hashes(cut, stage),
            "told": told,
            "saved": saved,
        }
        if rank() == 0:  # the next stage starts from the very same files
            shutil.copytree(whole.stage(stage), cut.stage(stage), dirs_exist_ok=True)
        barrier()
    return found


def go_on(left: Path, config: str, settings: Sequence[str] = ()) -> None:
    """Ends the runs that another layout has left."""
    for name in sorted(path.name for path in left.iterdir()):
        trained, stages = TRAINED[name]
        for stage in stages:
            run_dir = f"run_dir={left / name / stage}"
            train(stage, [config, *SETTINGS, trained, *settings, run_dir, "--resume"])


def leave_alone(folder: Path, config: str) -> None:
    """Whole runs of one process, and what each of their stages leaves when it is interrupted."""
    for name, (trained, stages) in TRAINED.items():
        run = RunFolder(folder / "alone" / name)
        command = [config, *SETTINGS, trained, f"run_dir={run.root}"]
        for stage in stages:
            train_interrupted(stage, command)
            leave(run, stage, folder / "left by one" / name)
            train(stage, [*command, "--resume"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    distributed.shut_down = barrier  # a process group cannot be made twice
    config = str(arguments.folder / "config.yaml")
    go_on(arguments.folder / "left by one", config, zero_settings(3))
    found = {str(zero): compare(arguments.folder, config, zero) for zero in (0, 2, 3)}
    if rank() == 0:
        (arguments.folder / "found.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
