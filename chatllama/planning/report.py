"""The plan as text: per stage memory by role and phase, batches, tokens, time, and the verdict."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from chatllama.config.schema import Config
from chatllama.planning.hardware import OVERHEAD, Gpu, gigabytes
from chatllama.planning.memory import Line, Place, StageMemory, plan_memory
from chatllama.planning.rates import expected_seconds, nearest_rates
from chatllama.planning.shape import ModelShape
from chatllama.planning.source import reward_model_bytes
from chatllama.planning.totals import batch_lines, bound_seconds, disk_bytes, host_bytes, stage_work
from chatllama.planning.verdict import Settings, judge, remedies, suggest
from chatllama.runs.folder import Stage
from chatllama.runtime.command_line import duration


@dataclass(frozen=True)
class Cluster:
    """The machines that a plan is for."""

    nodes: int = 1
    gpus: int = 1
    """Ranks on each machine."""
    gpu: Gpu | None = None
    """Its data sheet, for bounds of time."""
    memory: float | None = None
    """Bytes of one GPU; None: no verdict."""
    machine: str | None = None
    """Of `MeasuredRates`; None: a GPU of which only the memory is known."""

    @property
    def ranks(self) -> int:
        """Over all machines."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Rates:
    """How fast and how dear."""

    tokens_per_second: Mapping[Stage, float] = field(default_factory=dict[Stage, float])
    """Of all ranks together."""
    source: str = "given"
    examples: Mapping[Stage, float] = field(default_factory=dict[Stage, float])
    """Training sequences of one pass."""
    price: float | None = None
    """Of one GPU for an hour."""


def plan_lines(
    cfg: Config, shape: ModelShape, where: str, place: Place, cluster: Cluster, rates: Rates
) -> Iterator[str]:
    """The whole plan, line by line."""
    yield (
        f"{where}: {shape.parameters:,} parameters; {cluster.ranks} "
        f"{'rank' if cluster.ranks == 1 else 'ranks'} on {cluster.nodes} "
        f"{'machine' if cluster.nodes == 1 else 'machines'}, "
        f"{f'ZeRO-{cfg.deepspeed.stage}' if place.launched else 'without the launcher'}"
    )
    if cfg.backbone.attn_implementation == "eager":
        yield "attn_implementation eager keeps tables of all tokens against all, not counted here"
    for source in cfg.ppo.rewards if "ppo" in cfg.trained_stages else []:
        if source.model is not None and reward_model_bytes(source.model) is None:
            yield f"ppo.rewards: {source.model} is not on this machine and not counted"
    for stage in cfg.stages:
        if stage not in cfg.trained_stages:
            yield f"{stage}: a finished adapter takes its place"
    costs: list[float] = []
    for stage in cfg.trained_stages:
        yield ""
        memory = plan_memory(cfg, shape, place, stage)
        yield from stage_lines(memory, cluster.memory)
        yield f"  {batch_lines(cfg, cluster.ranks, stage)}"
        yield from _time_lines(cfg, shape, stage, cluster, rates, costs)
        if cluster.memory is not None and judge(memory.peak, cluster.memory) != "FITS":
            yield from remedy_lines(cfg, shape, place, stage, cluster.memory)
    yield ""
    if costs:
        yield f"time of the stages planned: {duration(sum(costs))}{_price(costs, cluster, rates)}"
    host = host_bytes(cfg, shape, place, cluster.gpus)
    yield f"memory of a machine while its ranks load the backbone: at most {gigabytes(host)}"
    disk = disk_bytes(cfg, shape)
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in disk.items())
    yield f"disk: {gigabytes(sum(disk.values()))} ({parts}; data sets not counted)"


def stage_lines(memory: StageMemory, limit: float | None) -> Iterator[str]:
    """A stage's verdict, and its memory on one rank by role and phase."""
    head = f"{memory.stage}: peak {gigabytes(memory.peak)} of tensors a rank, in `{memory.worst}`"
    if limit is not None:
        need = f"{gigabytes(memory.peak + OVERHEAD)} with CUDA's own (assumed)"
        head += f"; {need} of {gigabytes(limit)}: {judge(memory.peak, limit)}"
    yield head
    yield from _phase_lines("always", memory.held, memory.resident)
    for name, peak in memory.peaks.items():
        yield from _phase_lines(name, peak, memory.phases[name])


def _phase_lines(name: str, peak: float, lines: tuple[Line, ...]) -> Iterator[str]:
    yield f"  {name:<18}{gigabytes(peak):>9}"
    for role in dict.fromkeys(line.role for line in lines):
        own = [line for line in lines if line.role == role and line.bytes]
        parts = ", ".join(f"{line.name} {gigabytes(line.bytes)}" for line in own)
        if own:
            yield f"    {role or 'all roles':<16}{gigabytes(sum(x.bytes for x in own)):>9}  {parts}"


def remedy_lines(
    cfg: Config, shape: ModelShape, place: Place, stage: Stage, limit: float
) -> Iterator[str]:
    """The keys that lower a stage's peak, with prices."""
    for remedy in remedies(cfg, shape, place, stage, limit):
        value = str(remedy.value).lower()
        verdict = judge(remedy.peak, limit)
        yield (
            f"  turn {remedy.key}={value}: {gigabytes(remedy.peak)}, {verdict} "
            f"(costs {remedy.price})"
        )


def _time_lines(
    cfg: Config, shape: ModelShape, stage: Stage, cluster: Cluster, rates: Rates, costs: list[float]
) -> Iterator[str]:
    work = stage_work(cfg, stage, rates.examples.get(stage))
    if work is None:
        yield f"  steps depend on the data: give --examples {stage}=N, or set {stage}.steps"
        return
    text = f"  {work.steps:,} steps, at most {work.tokens:,} tokens"
    if work.sampled:
        text += f", {work.sampled:,} of them sampled; {work.trained:,} through training passes"
    yield text
    rate, source = rates.tokens_per_second.get(stage), rates.source
    row = nearest_rates(cfg, shape.parameters, cluster.machine)
    if rate is None and row is not None:
        rate = work.tokens / expected_seconds(row, cfg, shape.parameters, stage, work)
        rate *= cluster.ranks
        source = (
            f"measured {row.date} on {row.found} with {row.parameters / 1e9:.2g}B parameters, "
            "scaled by their number"
        )
    if rate is not None:
        costs.append(work.tokens / rate)
        yield (
            f"  {duration(costs[-1])} at {rate:,.0f} tokens per second ({source})"
            f"{_price(costs[-1:], cluster, rates)}"
        )
    else:
        yield f"  time: not measured on this hardware; give --rate {stage}=X or --probe"
    if cluster.gpu is not None:
        least = bound_seconds(cfg, shape, stage, work, cluster.gpu, cluster.ranks)
        yield f"  by the data sheet (roofline bound): no less than {duration(least)}, in truth more"


def _price(costs: list[float], cluster: Cluster, rates: Rates) -> str:
    if rates.price is None:
        return ""
    return f", {sum(costs) / 3600 * cluster.ranks * rates.price:,.2f} at {rates.price:g} a GPU hour"


def suggestion_lines(cfg: Config, shape: ModelShape, place: Place, memory: float) -> Iterator[str]:
    """Settings with which every stage fits; they keep the batches of optimizer steps."""
    settings: Settings | None = suggest(cfg, shape, place, memory)
    yield ""
    if settings is None:
        yield (
            "suggested: nothing that this plan knows fits; take larger or more GPUs, a smaller "
            "model, or shorter sequences (sft.max_length, reward.max_length, "
            "ppo.max_prompt_length, generation.max_new_tokens)"
        )
    elif not settings:
        yield "suggested: the config as it is"
    else:
        words = " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
        yield f"suggested: {words}"
