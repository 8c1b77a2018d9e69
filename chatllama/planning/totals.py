"""Everything of a stage but GPU memory: host memory, disk, batches, tokens, time."""

from collections.abc import Mapping
from dataclasses import dataclass

from chatllama.config.batch_sizes import microbatches_per_step, optimizer_steps, ppo_optimizer_steps
from chatllama.config.schema import Config
from chatllama.config.stages import StageSection
from chatllama.planning.hardware import Gpu
from chatllama.planning.memory import Place, stage_roles, weight_bytes
from chatllama.planning.shape import ModelShape
from chatllama.runs.folder import Stage

FILE_BYTES = 10e9
"""Of the largest file of published models."""


@dataclass(frozen=True)
class Work:
    """Tokens of a whole stage, at most: every sequence at its full length."""

    steps: int
    trained: int
    """That go through forward and backward passes of one trunk."""
    scored: int = 0
    """PPO: that go through passes without gradients."""
    sampled: int = 0
    """PPO: that are sampled, prompts not counted."""

    @property
    def tokens(self) -> int:
        """What rates count: tokens trained, in PPO those of prompts and responses, once."""
        return self.trained if not self.sampled else self.scored


def batch_lines(cfg: Config, ranks: int, stage: Stage) -> str:
    """How the stage's batches are split, in words; ValueError if they do not divide."""
    if stage == "ppo":
        section = cfg.ppo
        each = microbatches_per_step(section, ranks, "ppo")
        minibatches = section.rollout_batch_size // section.minibatch_size
        return (
            f"rollout batch {section.rollout_batch_size} -> {minibatches} x minibatch "
            f"{section.minibatch_size} -> {each} x microbatch {section.microbatch_size} x {ranks} "
            f"ranks; {section.epochs} epochs = {section.epochs * minibatches} optimizer steps a "
            f"step, {ppo_optimizer_steps(section):,} in all"
        )
    section = cfg.sft if stage == "sft" else cfg.reward
    each = microbatches_per_step(section, ranks, stage)
    split = f"{each} x microbatch {section.microbatch_size} x {ranks} ranks"
    return f"batch {section.batch_size} -> {split}"


def stage_work(cfg: Config, stage: Stage, examples: float | None) -> Work | None:
    """Steps and tokens of a stage; None where they depend on the data and `examples` is not known.

    Args:
        examples: training sequences of one pass (rows, where they are packed).
    """
    if stage == "ppo":
        section, new = cfg.ppo, cfg.generation.max_new_tokens
        responses = section.steps * section.rollout_batch_size
        whole = responses * (section.max_prompt_length + new)
        trunks = 2 if "value" in stage_roles(cfg, "ppo") else 1
        return Work(section.steps, whole * section.epochs * trunks, whole, responses * new)
    section = cfg.sft if stage == "sft" else cfg.reward
    if section.steps is None and examples is None:
        return None
    steps = optimizer_steps(section, max(1, round(examples or 1)))
    sequences = steps * section.batch_size * (1 if stage == "sft" else 2)
    return Work(steps, sequences * section.max_length)


def scoring_passes(cfg: Config) -> int:
    """Passes of PPO over its rollouts without gradients, at most: one a role."""
    return sum(role not in ("sft", "ema") for role in stage_roles(cfg, "ppo"))


def bound_seconds(
    cfg: Config, shape: ModelShape, stage: Stage, work: Work, gpu: Gpu, ranks: int
) -> float:
    """No less than this many seconds, by the GPU's data sheet: a roofline bound, no forecast.

    Training multiplies every weight once forward and once backward, once more where activations
    are computed again, and once more for gradients of the weights themselves. A decoding step reads
    all weights once.
    """
    products = 4 + 2 * cfg.backbone.gradient_checkpointing
    products += 2 * (stage == "sft" and cfg.lora is None)
    flops = float(products) * shape.parameters * work.trained
    flops += 2.0 * shape.parameters * work.scored * scoring_passes(cfg)
    seconds = flops / gpu.flops / ranks
    if work.sampled:
        rows = max(1, min(cfg.generation.batch_size, cfg.ppo.rollout_batch_size // ranks))
        steps = work.sampled / ranks / rows
        seconds += steps * weight_bytes(cfg, shape, "ppo") / gpu.bandwidth
    return seconds


def host_bytes(cfg: Config, shape: ModelShape, place: Place, here: int) -> float:
    """Bytes of one machine's memory while its ranks load the backbone, at most.

    Outside ZeRO-3 a rank reads one file at a time and puts its tensors on the GPU; else every rank
    may hold the whole model once.

    Args:
        here: ranks on the machine.
    """
    whole = 2.0 * shape.parameters
    if cfg.backbone.quantization == "none":
        whole = max(weight_bytes(cfg, shape, stage) for stage in cfg.trained_stages)
    if place.device == "cuda" and not (place.launched and cfg.deepspeed.stage == 3):
        return min(whole, FILE_BYTES) * here
    offloaded = whole / place.ranks if cfg.deepspeed.offload_param == "cpu" else 0.0
    return (whole + offloaded) * here


def disk_bytes(cfg: Config, shape: ModelShape) -> Mapping[str, float]:
    """Bytes on disk: the backbone as it is read, checkpoints at their most, results."""
    adapter = shape.adapter_parameters(cfg.adapter_lora)
    found: dict[str, float] = {"backbone": 2.0 * shape.parameters}
    sections: dict[Stage, StageSection] = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}
    for stage in cfg.trained_stages:
        section = sections[stage]
        trained = sum(stage_roles(cfg, stage).values()) * adapter
        full = stage == "sft" and cfg.lora is None
        elements = shape.parameters if full else trained
        results = elements + adapter * (stage == "ppo" and cfg.ppo.ema_decay is not None)
        if stage == "reward":
            results *= cfg.reward.ensemble
        saved = bool(section.save_every) * (section.save_total_limit + 1)  # one being written
        found[stage] = 4.0 * results + 12.0 * elements * saved
    return found
