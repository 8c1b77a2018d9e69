"""Whether a stage fits the GPU's memory, which keys to turn if not, and what to set."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from chatllama.config.schema import Config
from chatllama.planning.hardware import OVERHEAD, TIGHT
from chatllama.planning.memory import Place, plan_memory
from chatllama.planning.shape import ModelShape
from chatllama.runs.folder import Stage

Verdict = Literal["FITS", "TIGHT", "OUT OF MEMORY"]
Settings = dict[str, object]

LADDER: tuple[Settings, ...] = (
    {},
    {"backbone.gradient_checkpointing": True},
    {"backbone.gradient_checkpointing": True, "backbone.dtype": "bfloat16"},
    {"backbone.gradient_checkpointing": True, "deepspeed.stage": 2},
    {"backbone.gradient_checkpointing": True, "backbone.quantization": "nf4", "deepspeed.stage": 2},
    {"backbone.gradient_checkpointing": True, "deepspeed.stage": 3},
    {
        "backbone.gradient_checkpointing": True,
        "deepspeed.stage": 3,
        "deepspeed.offload_optimizer": "cpu",
        "deepspeed.offload_param": "cpu",
    },
)
"""Settings that save more and more memory and cost more and more time."""


@dataclass(frozen=True)
class Remedy:
    """A key that saves memory, with its price."""

    key: str
    value: object
    price: str
    peak: float
    """Bytes with it alone, in the phase of those asked for that takes most then."""
    phase: str
    """The phase that it lowers most."""
    lowered: float
    """Bytes of that phase then."""


def judge(peak: float, memory: float) -> Verdict:
    """Whether tensors of `peak` bytes and the libraries' overhead fit a GPU of `memory` bytes."""
    share = (peak + OVERHEAD) / memory
    return "FITS" if share <= TIGHT else "TIGHT" if share <= 1 else "OUT OF MEMORY"


def with_settings(cfg: Config, settings: Mapping[str, object]) -> Config | None:
    """The config with `section.key` values replaced; None where they do not go together."""
    content: dict[str, Any] = cfg.model_dump()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    try:
        return Config.model_validate(content)
    except ValidationError:
        return None


def remedies(
    cfg: Config, shape: ModelShape, place: Place, stage: Stage, limit: float | None = None
) -> list[Remedy]:
    """The keys that lower a phase's peak, those that cost least time first.

    Args:
        limit: bytes of a GPU; phases that fit it are not looked at.
    """
    before = plan_memory(cfg, shape, place, stage).peaks
    if limit is not None:
        before = {name: peak for name, peak in before.items() if judge(peak, limit) != "FITS"}
    found: list[Remedy] = []
    for key, value, price in _candidates(cfg, place, stage):
        changed = with_settings(cfg, {key: value})
        if changed is None:
            continue
        after = plan_memory(changed, shape, place, stage).peaks
        saved = {name: peak - after[name] for name, peak in before.items()}
        phase = max(saved, key=saved.__getitem__)
        if saved[phase] > 0.005 * before[phase]:
            peak = max(after[name] for name in before)
            found.append(Remedy(key, value, price, peak, phase, after[phase]))
    return found


def _candidates(cfg: Config, place: Place, stage: Stage) -> Iterator[tuple[str, object, str]]:
    size = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}[stage].microbatch_size
    if size > 1:
        yield f"{stage}.microbatch_size", _half(size), "hardly any time on long sequences"
    if stage == "ppo" and cfg.generation.batch_size > 1:
        yield "generation.batch_size", cfg.generation.batch_size // 2, "rollouts take longer"
    yield "backbone.gradient_checkpointing", True, "a third more time in training"
    yield "backbone.dtype", "bfloat16", "rounding"
    if place.launched and place.ranks > 1:
        yield "deepspeed.stage", 2, "communication"
    yield "backbone.quantization", "nf4", "rounding, and slower products"
    if place.launched and place.ranks > 1:
        yield "deepspeed.stage", 3, "much communication; slow rollouts"
        yield "deepspeed.offload_param", "cpu", "the bus to the host's memory"
    if place.launched:
        yield "deepspeed.offload_optimizer", "cpu", "the bus to the host's memory"


def _half(size: int) -> int:
    return max(divisor for divisor in range(1, size // 2 + 1) if size % divisor == 0)


def suggest(cfg: Config, shape: ModelShape, place: Place, memory: float) -> Settings | None:
    """The cheapest settings, with the largest batches, with which every stage FITS; None: none do.

    Batches per optimizer step stay as they are, so what is learned does too.
    """
    for rung in LADDER:
        settings = {key: value for key, value in rung.items() if _value(cfg, key) != value}
        if place.ranks == 1 and settings.get("deepspeed.stage") == 3:
            continue
        if with_settings(cfg, settings) is None:
            continue
        for stage in cfg.trained_stages:
            own = _largest(cfg, shape, place, stage, settings, memory)
            if own is None:
                break
            settings |= own
        else:
            return {key: value for key, value in settings.items() if _value(cfg, key) != value}
    return None


def _largest(
    cfg: Config, shape: ModelShape, place: Place, stage: Stage, rung: Settings, memory: float
) -> Settings | None:
    """The stage's largest microbatch, and in PPO the most rows of a rollout, that FIT."""
    found: Settings = {}
    for key, sizes, rollout in _sizes(cfg, place, stage):
        for size in sizes:
            changed = with_settings(cfg, {**rung, **found, key: size})
            if changed is None:
                continue
            peaks = plan_memory(changed, shape, place, stage).peaks
            # Microbatches do not change the rollout's peak, nor its rows those of other phases.
            most = max(peak for name, peak in peaks.items() if (name == "rollout") == rollout)
            if judge(most, memory) == "FITS":
                found[key] = size
                break
        else:
            return None
    return found


def _sizes(cfg: Config, place: Place, stage: Stage) -> Iterator[tuple[str, list[int], bool]]:
    """Keys of a stage's batches, their sizes from the largest on, and whether of the rollout."""
    section = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}[stage]
    whole = cfg.ppo.minibatch_size if stage == "ppo" else vars(section)["batch_size"]
    sizes = [n for n in range(whole // place.ranks, 0, -1) if whole % (n * place.ranks) == 0]
    yield f"{stage}.microbatch_size", sizes, False
    if stage == "ppo" and cfg.generation.engine == "local":
        most = max(1, cfg.ppo.rollout_batch_size // place.ranks)
        yield "generation.batch_size", [2**n for n in range(most.bit_length() - 1, -1, -1)], True


def _value(cfg: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return vars(vars(cfg)[section])[name]
