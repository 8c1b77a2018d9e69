"""Arguments of the commands that train and report; the commands are in chatllama/cli.py."""

import argparse
from pathlib import Path

from chatllama.runs.folder import STAGES, Stage
from chatllama.runtime.command_line import add_config_arguments


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares those of `chatllama run`."""
    add_config_arguments(parser)
    add = parser.add_argument
    about = (
        "go on from the newest checkpoint of an interrupted stage, with any number of ranks and "
        "under any ZeRO stage"
    )
    add("--resume", action="store_true", help=about)
    about = "do this stage and the later ones again; their results and checkpoints are removed"
    add("--from", dest="redo_from", choices=("sft", "reward", "ppo"), help=about)
    about = "run these stages alone, as in --only sft,ppo (default: all that the config has)"
    add("--only", type=_stages, metavar="STAGES", default=STAGES, help=about)
    about = "processes on this machine (default: all GPUs; without one, up to 2 on the CPU)"
    add("--num-gpus", type=int, metavar="N", help=about)
    add("--hostfile", type=Path, metavar="FILE", help="machines, `name slots=N` a line")
    add("--master-port", type=int, metavar="P", help="port of rank 0 (default: a free one)")
    about = (
        "start only the processes of line R (from 0) of the hostfile, without ssh: for Slurm, or "
        "by hand on every machine (docs/multinode.md)"
    )
    add("--node-rank", type=int, metavar="R", help=about)
    add("--master-addr", metavar="HOST", help="the hostfile's first machine")


def _stages(text: str) -> tuple[Stage, ...]:
    """The stages of a list with commas, in order."""
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in STAGES]:
        known = ", ".join(STAGES)
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no stage; known: {known}")
    return tuple(stage for stage in STAGES if stage in names)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares those of `report`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares those of `compare`."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders")
    about = "the page (default: compare.html beside the first run)"
    parser.add_argument("--out", metavar="FILE.html", type=Path, help=about)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares those of `sweep`."""
    add_config_arguments(parser)
    parser.epilog = "section.key=value,value,... makes a run for each value, below the run_dir."
    about = "a run on each GPU at a time (default: one after another, each on all GPUs)"
    parser.add_argument("--one-per-gpu", action="store_true", help=about)


def add_selftest_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares those of `selftest`."""
    add, seeds = parser.add_argument, [0, 1, 2]
    about = "of the training runs, one each (default: 0 1 2)"
    add("--seeds", type=int, nargs="+", default=seeds, metavar="N", help=about)
    add("--quick", action="store_true", help="leave the training runs out")
    about = "of the backbone (default: float32, whose limits are thousands of times narrower)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=about)
