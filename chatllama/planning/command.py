"""`chatllama plan`: the plan on stdout. Its arguments are in `cli.py`."""

import argparse
from typing import cast

from chatllama.config.batch_sizes import check_batches
from chatllama.config.loader import load_config
from chatllama.config.stage_checks import check_stages
from chatllama.planning.hardware import find_gpu, gpu_key, parse_memory
from chatllama.planning.memory import Place
from chatllama.planning.rates import CPU
from chatllama.planning.report import Cluster, Rates, plan_lines, suggestion_lines
from chatllama.planning.source import find_shape
from chatllama.runs.folder import STAGES, Stage
from chatllama.runtime.command_line import printable


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
    machine = gpu_key(arguments.gpu) if arguments.gpu else CPU if memory is None else None
    cluster = Cluster(arguments.nodes, arguments.gpus, gpu, memory, machine)
    if arguments.no_launcher and cluster.ranks > 1:
        raise ValueError("--no-launcher: without the launcher there is one rank; omit --gpus")
    cfg = load_config(arguments.config, arguments.overrides)
    check_stages(cfg)
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
