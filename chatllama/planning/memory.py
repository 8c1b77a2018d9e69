"""Bytes on one GPU in each stage: what stays, by role, and what each phase adds at its most.

The closed forms of passes are in `activations.py`. Sequences count at their greatest length, so
these are bounds for the data; allocator and CUDA context are in `verdict.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from chatllama.config.schema import Config, DeepSpeedSection
from chatllama.planning.activations import (
    CPU_CHUNK,
    GPU_CHUNK,
    PROMPT_TOKENS,
    Pass,
    Precision,
    decode_logits,
    head_chunk,
    kept_by_last_layer,
    kept_by_layer,
    kv_cache,
    transient_backward,
    transient_forward,
)
from chatllama.planning.shape import ModelShape
from chatllama.planning.sharding import bucket_bytes, gathered_bytes, resident_state, step_state
from chatllama.planning.source import reward_model_bytes
from chatllama.runs.folder import Stage

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""An element in 4 bits, an 8-bit scale for 64 of them, and a float32 one for 256 such scales."""


@dataclass(frozen=True)
class Line:
    """One thing that takes memory."""

    name: str
    bytes: float
    role: str = ""
    """Whose it is; empty: of all roles together."""


@dataclass(frozen=True)
class Place:
    """What one rank runs on."""

    ranks: int = 1
    """Over all machines."""
    launched: bool = True
    """Through `deepspeed` or `chatllama run`; false: `python train_ppo.py`, without ZeRO."""
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def chunk(self) -> int:
        """Float32 logits in memory at a time."""
        return GPU_CHUNK if self.device == "cuda" else CPU_CHUNK


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank in one stage."""

    stage: Stage
    resident: tuple[Line, ...]
    """Weights, adapters, optimizer state: there from the first step to the last."""
    phases: dict[str, tuple[Line, ...]]
    """What a phase of a step adds, at its most."""

    @property
    def held(self) -> float:
        """Bytes between steps."""
        return sum(line.bytes for line in self.resident)

    @property
    def peaks(self) -> dict[str, float]:
        """The most in each phase."""
        return {
            name: self.held + sum(line.bytes for line in lines)
            for name, lines in self.phases.items()
        }

    @property
    def peak(self) -> float:
        """The most in the stage."""
        return max(self.peaks.values())

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.peaks, key=self.peaks.__getitem__)


def stage_roles(cfg: Config, stage: Stage) -> dict[str, bool]:
    """Roles with an adapter of their own in a stage -> whether it trains."""
    if stage == "sft":
        return {} if cfg.lora is None else {"policy": True}
    if stage == "reward":
        return {"reward": True}
    roles: dict[str, bool] = {}
    if cfg.starts_from_sft or cfg.ppo.reference_refresh_every:
        roles["reference"] = False
    if cfg.starts_from_sft and cfg.ppo.reference_refresh_every:
        roles["sft"] = False
    roles["policy"] = True
    if cfg.ppo.ema_decay is not None:
        roles["ema"] = False
    members = sum(
        cfg.reward.ensemble if source.adapter == "run" else 1
        for source in cfg.ppo.rewards
        if source.adapter is not None
    )
    roles |= {f"reward_{i}" if i else "reward": False for i in range(members)}
    if cfg.ppo.advantage == "gae" and cfg.ppo.value_model == "adapter":
        roles["value"] = True
    return roles


def weight_bytes(cfg: Config, shape: ModelShape, stage: Stage) -> float:
    """Bytes of the whole backbone as it lies in memory in a stage, before ZeRO shards it."""
    if stage == "sft" and cfg.lora is None:
        return 4.0 * shape.parameters  # all weights train
    size = 2 if cfg.backbone.dtype == "bfloat16" else 4
    match cfg.backbone.quantization:
        case "none":
            return float(size * shape.parameters)
        case "nf4":
            packed = NF4_BYTES * shape.linear_parameters
        case "int8":
            outputs = shape.num_hidden_layers * sum(matrix.outputs for matrix in shape.matrices)
            packed = shape.linear_parameters + 4.0 * outputs
    return packed + size * (shape.table_parameters + shape.vector_parameters)


def plan_memory(cfg: Config, shape: ModelShape, place: Place, stage: Stage) -> StageMemory:
    """What a stage takes on one rank."""
    if not place.launched:
        alone = DeepSpeedSection(stage=0)
        cfg = cfg.model_copy(update={"deepspeed": alone})
    phases = {"sft": _sft, "reward": _reward, "ppo": _ppo}[stage](cfg, shape, place)
    return StageMemory(stage, tuple(_resident(cfg, shape, place, stage)), phases)


def _resident(cfg: Config, shape: ModelShape, place: Place, stage: Stage) -> Iterator[Line]:
    zero, full = cfg.deepspeed, stage == "sft" and cfg.lora is None
    split = place.ranks if zero.stage == 3 else 1
    weights = weight_bytes(cfg, shape, stage)
    if not full:
        kind = cfg.backbone.quantization if is_quantized(cfg) else cfg.backbone.dtype
        here = 0.0 if zero.offload_param != "none" else weights / split
        yield Line(f"backbone, {kind}", here)
    adapter = shape.adapter_parameters(cfg.adapter_lora)
    trained = {"policy": shape.parameters} if full else {}
    for role, trains in stage_roles(cfg, stage).items():
        yield Line("adapter", 4.0 * adapter / split, role)
        if trains:
            trained[role] = adapter
    if full:
        yield Line("weights, float32", weights / split, "policy")
    for role, elements in trained.items():
        for name, size in resident_state(zero, elements, place.ranks).items():
            yield Line(name, size, role)
    if stage == "ppo" and cfg.generation.engine == "local" and zero.stage < 3:
        half = cfg.backbone.dtype == "bfloat16"
        yield Line("copy in 16 bits, for sampling", 2.0 * adapter * half, "policy")
    for source in cfg.ppo.rewards if stage == "ppo" else []:
        if source.model is not None:
            size = reward_model_bytes(source.model) or 0.0
            yield Line(f"weights of {source.model}", size, "reward model")
    if zero.stage == 3:
        yield Line("buffer of gradient reduction", bucket_bytes(sum(trained.values())))


def is_quantized(cfg: Config) -> bool:
    """Whether the backbone's linear layers lie in 4 or 8 bits."""
    return cfg.backbone.quantization != "none"


def _precision(cfg: Config, stage: Stage) -> Precision:
    half = cfg.backbone.dtype == "bfloat16"
    full = stage == "sft" and cfg.lora is None
    return Precision(half, 2 if half and not full else 4)


Phases = dict[str, tuple[Line, ...]]


def _fetched(cfg: Config, shape: ModelShape, precision: Precision) -> Iterator[Line]:
    if cfg.deepspeed.stage == 3:
        yield Line("layers gathered by ZeRO-3", gathered_bytes(shape, precision.weights))


def _gradients(
    cfg: Config, place: Place, elements: int, role: str, adapter: bool
) -> Iterator[Line]:
    zero = cfg.deepspeed
    yield Line("gradients", step_state(zero, elements, place.ranks, adapter), role)
    if zero.stage in (1, 2):
        yield Line("buffer of their reduction", bucket_bytes(elements), role)


def _training(
    cfg: Config, shape: ModelShape, place: Place, stage: Stage, role: str, step: Pass
) -> Phases:
    """A pass with gradients, at the LM head (the reward stage has none) and backward."""
    lora = None if stage == "sft" and cfg.lora is None else cfg.adapter_lora
    precision, layers = _precision(cfg, stage), shape.num_hidden_layers
    kept = kept_by_layer(shape, lora, precision, step)
    elements = shape.parameters if lora is None else shape.adapter_parameters(lora)
    always = [
        *_fetched(cfg, shape, precision),
        *_gradients(cfg, place, elements, role, lora is not None),
    ]
    table = shape.vocab_size * shape.hidden_size
    if lora is None and precision.half:
        copies = 2.0 * (shape.linear_parameters + table)
        always.append(Line("matrices in 16 bits", copies, role))
    states = precision.product * shape.hidden_size * step.scored
    always.append(Line("states at the LM head, and their gradients", 2.0 * states, role))
    checkpointing = cfg.backbone.gradient_checkpointing
    if checkpointing:
        inputs = precision.weights * shape.hidden_size * step.tokens * layers
        always.append(Line("inputs of all layers", float(inputs), role))
    else:
        whole = kept * (layers - 1) + kept_by_last_layer(shape, lora, precision, step)
        always.append(Line(f"activations of {layers} layers", whole, role))
    back = [Line("one layer, computed again", kept, role)] if checkpointing else []
    inside = transient_backward(shape, precision, step, checkpointing)
    back.append(Line("gradients inside a layer", inside, role))
    if is_quantized(cfg):
        largest = max(matrix.weights for matrix in shape.matrices)
        back.append(Line("one matrix, dequantised", float(precision.product * largest), role))
    phases = {"backward": (*always, *back)}
    if stage != "reward":
        logits = head_chunk(shape, precision, step.scored, place.chunk)
        normed = float((4 + 2 * precision.product) * shape.hidden_size * step.scored)
        # A whole model's gradients of the head are there only after the last norm's are gone.
        last = Line("the last norm's, and copies", normed, role)
        if lora is None:
            last = Line("gradients of the LM head", 8.0 * table, role)
        head = [Line("logits", logits, role), last]
        phases["LM head"] = (*always, *head)
    return phases


def _sft(cfg: Config, shape: ModelShape, place: Place) -> Phases:
    section = cfg.sft
    step = Pass(section.microbatch_size, section.max_length, masked=section.packing)
    return _training(cfg, shape, place, "sft", "policy", step)


def _reward(cfg: Config, shape: ModelShape, place: Place) -> Phases:
    # Pairs too long to share a row with their prompt take a row for each answer.
    step = Pass(2 * cfg.reward.microbatch_size, cfg.reward.max_length, masked=True)
    return _training(cfg, shape, place, "reward", "reward", step)


def _ppo(cfg: Config, shape: ModelShape, place: Place) -> Phases:
    section, generation = cfg.ppo, cfg.generation
    precision, adapter = _precision(cfg, "ppo"), shape.adapter_parameters(cfg.adapter_lora)
    fetched = [*_fetched(cfg, shape, precision)]
    length = section.max_prompt_length + generation.max_new_tokens
    step = Pass(section.microbatch_size, length, read=generation.max_new_tokens)
    scoring = max(
        Line("activations of one layer", transient_forward(shape, precision, step)),
        Line("logits", head_chunk(shape, precision, step.scored, place.chunk)),
        key=lambda line: line.bytes,
    )
    copies = [Line("adapters in 16 bits", 2.0 * adapter)] if precision.half else []
    phases: Phases = {"scoring": (*fetched, *copies, scoring)}
    if generation.engine == "local":
        phases["rollout"] = (*fetched, *_rollout(cfg, shape, precision))
    for name, lines in _training(cfg, shape, place, "ppo", "policy", step).items():
        beside = (*_value_beside(cfg, place, lines, adapter), *_ptx_beside(cfg, shape, precision))
        phases[f"update, {name}"] = (*lines, *beside)
    return phases


def _rollout(cfg: Config, shape: ModelShape, precision: Precision) -> Iterator[Line]:
    section, generation = cfg.ppo, cfg.generation
    rows, prompt = generation.batch_size, section.max_prompt_length
    columns = prompt + generation.max_new_tokens
    yield Line("KV cache", kv_cache(shape, precision.product, rows, columns))
    merges = cfg.backbone.dtype == "float32" and not is_quantized(cfg)
    if generation.merge_lora != "never" and merges and cfg.deepspeed.stage < 3:
        adapted = sum(matrix.weights for matrix in shape.adapted(cfg.adapter_lora))
        merged = 4.0 * shape.num_hidden_layers * adapted
        yield Line("matrices with the adapter merged", merged, "policy")
    if cfg.deepspeed.stage == 3 and cfg.deepspeed.gather_for_rollouts is True:
        yield Line("whole model, gathered", weight_bytes(cfg, shape, "ppo"))
    read = Pass(min(rows, max(1, PROMPT_TOKENS // prompt)), prompt, read=1, masked=True)
    reading = transient_forward(shape, precision, read)
    yield Line("reading prompts", max(reading, decode_logits(shape, precision, rows)))


def _value_beside(
    cfg: Config, place: Place, lines: tuple[Line, ...], adapter: int
) -> Iterator[Line]:
    """What a value adapter of its own adds to the policy's pass."""
    if "value" not in stage_roles(cfg, "ppo"):
        return
    yield from _gradients(cfg, place, adapter, "value", True)
    if cfg.deepspeed.stage == 3:  # both graphs are alive
        kept = [line for line in lines if line.name.startswith(("activations", "inputs", "states"))]
        yield Line("graph of the value", sum(line.bytes for line in kept), "value")
        return
    yield Line("gradients, computed already", 4.0 * adapter, "value")


def _ptx_beside(cfg: Config, shape: ModelShape, precision: Precision) -> Iterator[Line]:
    """The graph of other text, alive together with the policy's."""
    section = cfg.ppo
    if not section.ptx_coef:
        return
    step = Pass(section.ptx_microbatch_size, section.ptx_max_length)
    kept = kept_by_layer(shape, cfg.adapter_lora, precision, step)
    if cfg.backbone.gradient_checkpointing:
        kept = float(precision.weights * shape.hidden_size * step.tokens)
    yield Line("graph of the ptx text", kept * shape.num_hidden_layers, "policy")
