"""What tests/engine/test_faults.py runs on two ranks: one meets a fault, the other waits for it."""

import argparse
import os
import signal
import time
from pathlib import Path

import torch

from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder
from chatllama.runs.replicas import views_of
from chatllama.runtime.distributed import all_sum, barrier, rank, shut_down
from trainers.stages import stage
from trainers.stages.arguments import run_stage


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("fault")
    parser.add_argument("faulty", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if rank() == arguments.faulty and arguments.fault == "early":
        raise ValueError("a mistake before the ranks have met")
    values = {"run_dir": str(arguments.folder), "backbone": {"path": "-"}}
    limit = {"timeout_minutes": 0.1} if arguments.fault == "stop" else {}
    cfg = Config.model_validate(values | {"deepspeed": limit})
    stage.join(cfg, RunFolder(arguments.folder), "sft", None)
    views = [sees for _, sees in views_of(arguments.folder)]
    (arguments.folder / f"views-{rank()}").write_text(str(views))
    (arguments.folder / f"pid-{rank()}").write_text(str(os.getpid()))
    barrier()
    if rank() == arguments.faulty:
        match arguments.fault:
            case "mistake":
                raise ValueError("the first mistake")
            case "crash":
                raise RuntimeError("the first crash")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
    while arguments.fault == "none":
        all_sum(torch.ones(4))
        time.sleep(0.1)
    all_sum(torch.ones(4))
    shut_down()


if __name__ == "__main__":
    run_stage(main)
