"""`chatllama plan`: its arguments, and the plan on stdout. It loads no model and no torch."""

import argparse
from pathlib import Path
from typing import cast

from chatllama.config.batch_sizes import check_batches
from chatllama.config.loader import load_config
from chatllama.planning.hardware import GPUS, find_gpu, parse_memory
from chatllama.planning.memory import Place
from chatllama.planning.report import Cluster, Rates, plan_lines, suggestion_lines
from chatllama.planning.source import find_shape
from chatllama.runs.folder import STAGES, Stage
from chatllama.runtime.command_line import add_config_arguments, printable


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `chatllama plan`."""
    add_config_arguments(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="ranks on each machine (default: 1)")
    add("--nodes", type=int, default=1, metavar="M", help="machines (default: 1)")
    add("--gpu", metavar="NAME", help=f"memory and data sheet of a GPU: {', '.join(GPUS)}")
    add("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 24GB; replaces --gpu's")
    about = "as `python train_x.py`: one process, without DeepSpeed"
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


def plan(arguments: argparse.Namespace, probed: dict[Stage, float] | None = None) -> None:
    """Prints the plan.

    Args:
        probed: measured tokens per second of all ranks.

    Raises:
        ValueError: wrong arguments, an invalid config, or no shape of its model.
    """
    for flag, value in (("--gpus", arguments.gpus), ("--nodes", arguments.nodes)):
        if value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        raise ValueError(f"--price {arguments.price}: must be 0 or more")
    gpu = find_gpu(arguments.gpu) if arguments.gpu else None
    memory = parse_memory(arguments.gpu_memory) if arguments.gpu_memory else None
    if memory is None and gpu is not None:
        memory = gpu.memory
    if arguments.suggest and memory is None:
        raise ValueError("--suggest needs the GPU's memory: give --gpu or --gpu-memory")
    cluster = Cluster(arguments.nodes, arguments.gpus, gpu, memory)
    if arguments.no_launcher and cluster.ranks > 1:
        raise ValueError("--no-launcher: without the launcher there is one rank; omit --gpus")
    cfg = load_config(arguments.config, arguments.overrides)
    check_batches(cfg, cluster.ranks)
    shape, where = find_shape(cfg, arguments.model_config)
    examples = by_stage("--examples", arguments.examples)
    given = by_stage("--rate", arguments.rate)
    source = "three steps, just measured here" if probed else "given"
    rates = Rates(probed or given, source, examples, arguments.price)
    place = Place(cluster.ranks, not arguments.no_launcher, "cuda" if memory else "cpu")
    lines = [*plan_lines(cfg, shape, where, place, cluster, rates)]
    if arguments.suggest and memory is not None:
        lines += suggestion_lines(cfg, shape, place, memory)
    print("\n".join(map(printable, lines)))


def by_stage(flag: str, given: list[str]) -> dict[Stage, float]:
    """Numbers above 0 by stage, of words such as `sft=52000`.

    Raises:
        ValueError: a word has another form, or a stage comes twice.
    """
    found: dict[Stage, float] = {}
    for word in given:
        stage, _, text = word.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if stage not in STAGES or stage in found or not 0 < number < float("inf"):
            raise ValueError(
                f"{flag} {word!r}: give {', '.join(f'{s}=N' for s in STAGES)}, each once, N above 0"
            )
        found[cast(Stage, stage)] = number
    return found
