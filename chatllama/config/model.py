"""The sections about the model: backbone, from-scratch training, chat template, LoRA."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chatllama.config.base import FilePath, Fraction, NonNegative, Positive, PositiveFloat, Section
from chatllama.config.sources import DataSource

Day = Annotated[str, Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$")]


class FromScratch(Section):
    """A tokenizer and a small LLaMA made from plain text, by `train_sft.py`, before SFT."""

    data: Annotated[list[DataSource], Field(min_length=1)]
    """Plain text to learn from (format `text`)."""
    vocab_size: Positive = 512
    """Pieces of the SentencePiece BPE model, including special and byte pieces."""
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
    learning_rate: Annotated[float, Field(gt=0, le=1e37)] = 2e-3
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


CODE_NOT_RUN = (
    "it brings Python code of its own, which is not run. If you trust whoever wrote it, set "
    "backbone.trust_remote_code: true"
)
"""Why a model is refused; commands that open a run name their flag in place of the key."""


class BackboneSection(Section):
    """The LLaMA that all roles share, frozen."""

    path: FilePath | None = None
    """Local Hugging Face folder or hub id. null only with from_scratch."""
    revision: str | None = None
    """Hub revision (commit, tag or branch). null: the default branch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights and of the matrix products. Adapters and heads are float32.
    float16 is for inference only: `--dtype` of chat, generate, serve and eval."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Frozen linear layers in 8 or 4 bits (QLoRA; extra `bitsandbytes`; not with ZeRO-3 or
    `lora: null`). Matrix products stay in dtype, adapters and heads in float32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = "sdpa"
    """Attention kernel, as transformers names it. With flash_attention_2 (CUDA, the package
    flash-attn) the reward stage repeats a prompt for every answer. varlen: sdpa, except that PPO
    scores packed rows by PyTorch's own FlashAttention (CUDA, bfloat16); not measured on a GPU yet.
    Inference uses sdpa for it."""
    liger_kernel: bool = False
    """Liger's fused kernels (RMSNorm, rotary embedding, SwiGLU) in training: CUDA, extra `liger`.
    Not measured on a GPU yet."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. false: such a model is refused."""
    from_scratch: FromScratch | None = None
    """Train tokenizer and backbone on plain text first, into RUN/backbone."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value == "float16":
            raise ValueError(
                "float16 is for inference only (--dtype of chat, generate, serve and eval): "
                "training has no loss scaling, so small gradients would become 0; use bfloat16 "
                "or float32"
            )
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "BackboneSection":
        if self.attn_implementation == "varlen" and self.dtype != "bfloat16":
            raise ValueError(
                f"attn_implementation varlen computes in bfloat16, not in dtype {self.dtype}; "
                "choose sdpa"
            )
        if self.attn_implementation == "flash_attention_2" and self.dtype != "bfloat16":
            raise ValueError(
                f"attn_implementation flash_attention_2 computes in bfloat16, not in dtype "
                f"{self.dtype}; choose sdpa"
            )
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of path and from_scratch")
        return self

    @property
    def against_compiling(self) -> str | None:
        """Why the decoding step cannot be compiled; None if it can."""
        if self.quantization != "none":
            return (
                f"quantised weights ({self.quantization}) are multiplied by bitsandbytes, which "
                "torch.compile cannot trace; use quantization none, or do not compile"
            )
        if self.attn_implementation not in ("sdpa", "varlen"):
            return (
                "the mask of a compiled step has a form that only backbone.attn_implementation "
                f"sdpa takes, not {self.attn_implementation}"
            )
        return None


class ChatSection(Section):
    """How a conversation becomes tokens, in all stages and in chat."""

    template: Literal["auto", "llama2", "llama3", "alpaca", "vicuna", "chatml", "tokenizer"] = (
        "auto"
    )
    """Chat template. `tokenizer`: the one that comes with the tokenizer. auto: that one where there
    is one, else llama2; the run folder's config.yaml names it."""
    system: str | None = None
    """System prompt for conversations that have none."""
    date: Day | None = None
    """Day that a tokenizer's template writes, YYYY-MM-DD. null: that on which the run starts."""


class LoraSection(Section):
    """Adapters (Hu 2021, arXiv 2106.09685)."""

    r: Positive = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout before the adapter during SFT and reward training. PPO always runs without."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: all linear ones but the LM head, or names such as q_proj."""


def without_training_kernels(section: "BackboneSection") -> "BackboneSection":
    """The section without the kernels for training, so that any machine can open any run."""
    changes: dict[str, object] = {"liger_kernel": False}
    if section.attn_implementation == "varlen":
        changes["attn_implementation"] = "sdpa"  # the same where rows are not packed
    return section.model_copy(update=changes)
