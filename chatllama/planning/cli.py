"""The arguments of `chatllama plan`; imports nothing that `--help` would have to wait for."""

import argparse
from pathlib import Path

from chatllama.planning.hardware import GPUS
from chatllama.runtime.command_line import add_config_arguments


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `chatllama plan`."""
    add_config_arguments(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="ranks on each machine (default: 1)")
    add("--nodes", type=int, default=1, metavar="M", help="machines (default: 1)")
    add("--gpu", metavar="NAME", help=f"memory and data sheet of a GPU: {', '.join(GPUS)}")
    add("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 24GB; replaces --gpu's")
    about = "as `python train_ppo.py`: one process, without DeepSpeed"
    add("--no-launcher", action="store_true", help=about)
    about = "the cheapest settings and the largest microbatches with which all stages fit"
    add("--suggest", action="store_true", help=about)
    about = "a config.json to plan with in place of the backbone's"
    add("--model-config", type=Path, metavar="FILE", help=about)
    about = "training sequences of one pass, where steps follow from epochs; once a stage"
    add("--examples", action="append", default=[], metavar="STAGE=N", help=about)
    about = "tokens per second of all GPUs together; once a stage"
    add("--rate", action="append", default=[], metavar="STAGE=X", help=about)
    about = "measure the rates: run three steps of every stage here, in a folder of their own"
    add("--probe", action="store_true", help=about)
    add("--price", type=float, metavar="X", help="of one GPU for an hour, in any currency")
