"""Rates that were measured: tokens per second by machine, model size and what is done.

A row is what `make gpu` writes at its end (`benchmarks/gpu.py`), or `benchmarks/large_stages.py`
on a CPU. Not measured: every GPU.
"""

from dataclasses import dataclass

from chatllama.config.schema import Config
from chatllama.planning.totals import Work, scoring_passes
from chatllama.runs.folder import Stage

CPU = "one CPU core"
NEAREST = 4.0
"""Times larger or smaller than the measured model that a planned one may be."""


@dataclass(frozen=True)
class MeasuredRates:
    """Tokens per second of one GPU, or of one core of a CPU."""

    date: str
    found: str
    """The machine's own name."""
    machine: str
    """A name of `--gpu`, or `CPU`."""
    parameters: int
    dtype: str
    sft: float
    reward: float
    sampling: float
    """Of new tokens."""
    scoring: float
    """Of one pass without gradients."""
    update: float
    """Of one trunk, forward and backward."""


MEASURED: tuple[MeasuredRates, ...] = (
    MeasuredRates(
        date="2026-12-01",
        found="AMD EPYC (AVX-512)",
        machine=CPU,
        parameters=24_407_712,
        dtype="float32",
        sft=1631.4,
        reward=2864.0,
        sampling=716.2,
        scoring=5537.1,
        update=2296.2,
    ),
    MeasuredRates(
        date="2026-12-01",
        found="AMD EPYC (AVX-512)",
        machine=CPU,
        parameters=162_826_560,
        dtype="float32",
        sft=159.2,
        reward=228.2,
        sampling=65.4,
        scoring=464.5,
        update=184.8,
    ),
)
"""On CPUs by CPU seconds of one thread, checkpointed; 64 + 64 tokens, of the larger 32 + 32."""


def nearest_rates(cfg: Config, parameters: int, machine: str | None) -> MeasuredRates | None:
    """The row of the machine whose model is nearest in size; None: nothing near was measured.

    Args:
        machine: of `MeasuredRates`.
    """
    rows = [
        row
        for row in MEASURED
        if row.machine == machine
        and row.dtype == _dtype(cfg)
        and 1 / NEAREST <= row.parameters / parameters <= NEAREST
    ]
    far = [max(row.parameters / parameters, parameters / row.parameters) for row in rows]
    return rows[far.index(min(far))] if rows else None


def _dtype(cfg: Config) -> str:
    """The backbone's type, or how it is quantised."""
    quantization = cfg.backbone.quantization
    return cfg.backbone.dtype if quantization == "none" else quantization


def expected_seconds(
    row: MeasuredRates, cfg: Config, parameters: int, stage: Stage, work: Work
) -> float:
    """Seconds of a stage on one rank; a token's work is taken to grow as the parameters."""
    if stage == "sft":
        seconds = work.trained / row.sft
    elif stage == "reward":
        seconds = work.trained / row.reward
    else:
        seconds = work.sampled / row.sampling + work.trained / row.update
        seconds += work.scored * scoring_passes(cfg) / row.scoring
    return seconds * parameters / row.parameters
