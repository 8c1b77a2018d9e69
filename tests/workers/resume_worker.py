"""What tests/test_resume.py runs through the launcher on two ranks.

SFT, reward model and PPO under ZeRO 0, 2 and 3: each without interruption, and each told to stop
by a signal to rank 1 alone, then resumed. All in one process, since starting one takes longer.
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

from chatllama import distributed, interruption
from chatllama.checkpoint import step_folders
from chatllama.distributed import barrier, rank, shut_down
from chatllama.run_folder import STAGES, RunFolder, Stage
from trainers.hf_trainer import forget_accelerator

STOP_AFTER: dict[Stage, int] = {"sft": 2, "reward": 3, "ppo": 1}
SETTINGS = ["sft.steps=4", "reward.steps=4", "ppo.steps=3", "reward.save_every=0",
            "sft.save_every=0", "ppo.save_every=0"]  # fmt: skip


def train(stage: Stage, command: Sequence[str]) -> None:
    """One stage; the process can do another after it."""
    interruption.listen()
    forget_accelerator()
    try:
        MAINS[stage](list(command))
    finally:
        gc.collect()
        barrier()


def train_interrupted(stage: Stage, command: Sequence[str]) -> None:
    """The same, with a signal to rank 1 in the middle."""
    asked, original = [0], interruption.stop_requested

    def counting() -> bool:
        asked[0] += 1
        if asked[0] == STOP_AFTER[stage] and rank() == 1:
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


def compare(folder: Path, config: str, zero: int) -> dict[str, dict[str, Any]]:
    """Both ways through the three stages under a ZeRO stage."""
    whole, cut = (RunFolder(folder / f"{name}-{zero}") for name in ("whole", "cut"))
    section = [f"deepspeed.stage={zero}", "deepspeed.stage3_param_persistence_threshold=0"]
    found = {}
    for stage in STAGES:
        common = [config, *SETTINGS, *section]
        train(stage, [*common, f"run_dir={whole.root}"])
        command = [*common, f"run_dir={cut.root}"]
        train_interrupted(stage, command)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    distributed.shut_down = barrier  # a process group cannot be made twice
    config = str(arguments.folder / "config.yaml")
    found = {str(zero): compare(arguments.folder, config, zero) for zero in (0, 2, 3)}
    if rank() == 0:
        (arguments.folder / "found.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
