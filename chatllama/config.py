"""The YAML file as typed sections: every key, its unit, its default and its limits.

A default lives here (or in `config_stages.py`, `config_generation.py` and `config_ppo.py`) and
nowhere else. Reading files, `extends:` and command-line overrides are in `config_loader.py`;
numbers derived from these (microbatches, steps) are in `batching.py`.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chatllama.config_base import (
    ColumnMapping,
    DataSource,
    Format,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Schedule,
    Section,
    language_codes,
    split_language,
)
from chatllama.config_generation import GenerationSection
from chatllama.config_ppo import PpoSection, RewardSource
from chatllama.config_stages import (
    OptimizerSection,
    RewardSection,
    SftSection,
    StageSection,
)

__all__ = [
    "BackboneSection",
    "ChatSection",
    "ColumnMapping",
    "Config",
    "DataSource",
    "DeepSpeedSection",
    "EvaluationSection",
    "Format",
    "FromScratch",
    "GenerationSection",
    "LoraSection",
    "OptimizerSection",
    "PpoSection",
    "RewardSection",
    "RewardSource",
    "Schedule",
    "Section",
    "SftSection",
    "StageSection",
    "TrackingSection",
    "language_codes",
    "split_language",
]


class FromScratch(Section):
    """A tokenizer and a small LLaMA made from plain text, by `train_sft.py`, before SFT."""

    data: Annotated[list[DataSource], Field(min_length=1)]
    """Plain text to learn from (format `text`)."""
    vocab_size: Positive = 512
    """Pieces of the SentencePiece BPE model, special and byte pieces included."""
    hidden_size: Positive = 128
    """Width of the residual stream."""
    intermediate_size: Positive = 352
    """Width of the MLP."""
    num_layers: Positive = 3
    """Transformer blocks."""
    num_heads: Positive = 4
    """Attention heads."""
    num_kv_heads: Positive = 4
    """Key and value heads (fewer than num_heads: grouped-query attention)."""
    max_positions: Positive = 256
    """Longest sequence, in tokens."""
    steps: Positive = 500
    """Optimizer steps of pretraining."""
    batch_size: Positive = 32
    """Packed sequences per optimizer step, over all ranks."""
    microbatch_size: Positive = 16
    """Packed sequences per forward pass, on one rank."""
    max_length: Positive = 128
    """Tokens of a packed sequence."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate (cosine to 10 %)."""
    warmup_steps: NonNegative = 20
    """Optimizer steps of linear warm-up."""

    @model_validator(mode="after")
    def _check_shape(self) -> "FromScratch":
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_heads, and num_heads of num_kv_heads"
            )
        if self.max_length > self.max_positions:
            raise ValueError(f"max_length {self.max_length} > max_positions {self.max_positions}")
        return self


class BackboneSection(Section):
    """The LLaMA that all roles share, frozen."""

    path: str | None = None
    """Local Hugging Face folder or hub id. null only with from_scratch."""
    revision: str | None = None
    """Hub revision (commit, tag or branch). null: the default branch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights and of the matrix products. Adapters and heads are float32.
    float16 is for answering only: `--dtype` of chat, generate, serve and eval."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Frozen linear layers in 8 or 4 bits (QLoRA; extra `bitsandbytes`; not with ZeRO-3 or
    `lora: null`). Matrix products stay in dtype, adapters and heads in float32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = "sdpa"
    """Attention kernel, as transformers names it. With flash_attention_2 (CUDA, the package
    flash-attn) the reward stage repeats a prompt for every answer. varlen is sdpa but for one call
    of PyTorch's own FlashAttention where PPO scores packed rows (CUDA, bfloat16); it has not been
    measured on a GPU yet. Answering takes sdpa for it."""
    liger_kernel: bool = False
    """Liger's fused kernels (RMSNorm, rotary embedding, SwiGLU) in training: CUDA, extra `liger`.
    Not measured on a GPU yet."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    from_scratch: FromScratch | None = None
    """Train tokenizer and backbone from text first, into RUN/backbone."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value == "float16":
            raise ValueError(
                "float16 is for answering only (--dtype of chat, generate, serve and eval): "
                "training has no loss scaling, so that small gradients would become 0; use "
                "bfloat16 or float32"
            )
        return value

    @model_validator(mode="after")
    def _has_kernel(self) -> "BackboneSection":
        if self.attn_implementation == "varlen" and self.dtype != "bfloat16":
            raise ValueError(
                f"attn_implementation varlen computes in bfloat16, not in dtype {self.dtype}; "
                "choose sdpa"
            )
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> "BackboneSection":
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of path and from_scratch")
        return self

    @property
    def against_compiling(self) -> str | None:
        """Why the step of one token cannot be compiled. None: it can."""
        if self.quantization != "none":
            return (
                f"quantised weights ({self.quantization}) are multiplied by bitsandbytes, which "
                "torch.compile cannot look into; use quantization none, or do not compile"
            )
        if self.attn_implementation not in ("sdpa", "varlen"):
            return (
                "the mask of a compiled step has a form that only backbone.attn_implementation "
                f"sdpa takes, not {self.attn_implementation}"
            )
        return None


class ChatSection(Section):
    """How a conversation becomes tokens: one contract for SFT, reward, PPO and chat."""

    template: Literal["llama2", "llama3", "alpaca", "vicuna", "chatml", "tokenizer"] = "llama2"
    """Layout of the turns. `tokenizer`: the chat template that the tokenizer brings."""
    system: str | None = None
    """System prompt for conversations that bring none."""


class LoraSection(Section):
    """Adapters (Hu 2021, arXiv 2106.09685)."""

    r: Positive = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout before the adapter during SFT and reward training. PPO always runs without."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get an adapter: all linear ones but the LM head, or names such as q_proj."""


class DeepSpeedSection(Section):
    """ZeRO settings, used when a script is started by the `deepspeed` launcher."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage. 2 suits LoRA; 3 shards the backbone too, for models larger than one GPU."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state lives (cpu: stages 1 to 3; nvme: stage 3, with GPUs only)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters live (stage 3)."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, the same path on every node, for what is offloaded to nvme.
    Needs the system's libaio (Debian: libaio-dev) and a C++ compiler."""
    stage3_param_persistence_threshold: NonNegative = 100_000
    """Parameters with fewer elements stay whole on every rank (stage 3)."""
    gather_for_rollouts: bool | Literal["auto"] = "auto"
    """Stage 3: true brings the whole model to every rank once per rollout batch (fast; each GPU
    must hold it); false goes layer by layer for every token, slower but within a shard's memory.
    auto: true where the model takes at most 80 % of every rank's free memory, else false with a
    warning."""

    @model_validator(mode="after")
    def _check_offload(self) -> "DeepSpeedSection":
        places = (self.offload_optimizer, self.offload_param)
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(
                f"offload_param needs stage 3, not {self.stage}: below it every rank computes "
                "with the whole parameters"
            )
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError(
                "offload_optimizer needs stage 1, 2 or 3, not 0, which is plain data parallelism"
            )
        if "nvme" in places and self.stage != 3:
            raise ValueError(
                f"offloading to nvme needs stage 3, not {self.stage}, where DeepSpeed would use "
                "the CPU's memory instead"
            )
        if ("nvme" in places) != (self.nvme_path is not None):
            raise ValueError("nvme_path and offloading to nvme go together: give both or neither")
        return self


class EvaluationSection(Section):
    """What `chatllama run` measures at the end, on held-out prompts."""

    num_prompts: NonNegative = 256
    """Held-out prompts answered by every role. 0: no evaluation."""
    gold: str | None = None
    """`module:function` from (prompt, response) strings to a float: the true reward, if known."""
    label_scale: PositiveFloat | None = None
    """With gold: labels were drawn with probability sigmoid(label_scale * gold difference),
    which gives the best accuracy that any reward model can have (the Bayes limit)."""


class TrackingSection(Section):
    """Progress display, metrics and samples."""

    report_to: list[str] = ["tensorboard"]
    """Trackers beside metrics.jsonl: tensorboard, wandb (needs the extra of that name)."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl and trackers."""
    sample_every: NonNegative = 10
    """PPO steps between printed samples. 0: none."""


class Config(Section):
    """The whole YAML."""

    run_dir: str
    """Folder that receives everything the run writes."""
    seed: NonNegative = 0
    """Seeds data order, splits, initial weights and sampling."""
    backbone: BackboneSection
    """The shared LLaMA."""
    chat: ChatSection = ChatSection()
    """Conversation layout."""
    lora: LoraSection | None = LoraSection()
    """Adapters of all roles. null: SFT trains all weights, and its result becomes the base."""
    later_lora: LoraSection | None = None
    """With `lora: null`: the adapters of the reward and PPO stages (null: the defaults)."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    """ZeRO settings."""
    sft: SftSection = SftSection()
    """Stage 1."""
    reward: RewardSection = RewardSection()
    """Stage 2."""
    ppo: PpoSection = PpoSection()
    """Stage 3."""
    generation: GenerationSection = GenerationSection()
    """Sampling."""
    evaluation: EvaluationSection = EvaluationSection()
    """The final measurement."""
    tracking: TrackingSection = TrackingSection()
    """Logging."""

    @model_validator(mode="after")
    def _check_lora(self) -> "Config":
        if self.lora is not None and self.later_lora is not None:
            raise ValueError("later_lora is only for `lora: null`")
        quantization = self.backbone.quantization
        if quantization != "none" and self.deepspeed.stage == 3:
            raise ValueError(
                f"backbone.quantization {quantization}: ZeRO-3 cannot split quantised weights; use "
                "deepspeed.stage 2, or quantization none"
            )
        if quantization != "none" and self.lora is None:
            raise ValueError(
                f"backbone.quantization {quantization}: `lora: null` trains all weights, and "
                "quantised ones cannot be trained"
            )
        if self.lora is None and self.ppo.reference_refresh_every:
            raise ValueError(
                "ppo.reference_refresh_every needs a reference adapter; with `lora: null` the "
                "reference is the base itself"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> "Config":
        if not self.generation.compile:
            return self
        if self.backbone.against_compiling is not None:
            raise ValueError(f"generation.compile: {self.backbone.against_compiling}")
        if self.backbone.liger_kernel:
            raise ValueError(
                "generation.compile: backbone.liger_kernel is on, and no compiled step has been "
                "tried with Liger's kernels; use one of the two"
            )
        if self.deepspeed.stage == 3:
            raise ValueError(
                "generation.compile: deepspeed.stage 3 fetches the weights to other memory in "
                "every rollout; use stage 2 or less, or do not compile"
            )
        return self

    @property
    def adapter_lora(self) -> LoraSection:
        """The adapter shape of the reward and PPO stages."""
        return self.lora or self.later_lora or LoraSection()
