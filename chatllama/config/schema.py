"""The whole YAML file as typed sections: every key, its unit, its default and its limits.

A default is in this package's sections and nowhere else. Reading files, `extends:` and command-line
overrides are in `loader.py`; numbers derived from the keys are in `batch_sizes.py`.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chatllama.config.base import (
    FilePath,
    FunctionName,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
)
from chatllama.config.generation import GenerationSection
from chatllama.config.limits import MOST_SEED
from chatllama.config.model import BackboneSection, ChatSection, LoraSection
from chatllama.config.ppo import PpoSection
from chatllama.config.stages import RewardSection, SftSection, StageSection

StageName = Literal["sft", "reward", "ppo"]


class DeepSpeedSection(Section):
    """ZeRO settings, used when a script is started by the `deepspeed` launcher."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage. 2 suits LoRA; 3 shards the backbone too, for models larger than one GPU.
    Adapters' gradients are reduced once a step; with `lora: null` at every microbatch in stages 2
    and 3."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state is stored (cpu: stages 1 to 3; nvme: stage 3, with GPUs only)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters are stored (stage 3)."""
    nvme_path: FilePath | None = None
    """Folder on a local NVMe disk for offloading to nvme; the same path on every node. Needs the
    system's libaio (Debian: libaio-dev) and a C++ compiler."""
    stage3_param_persistence_threshold: NonNegative = 100_000
    """Stage 3: parameters with fewer elements are not sharded."""
    gather_for_rollouts: bool | Literal["auto"] = "auto"
    """Stage 3: true gathers the whole model on every rank once per rollout batch (fast; each GPU
    must hold it), false one layer at a time for every token (slow, little memory). auto: true if
    the model takes at most 80 % of every rank's free memory; else false, with a warning."""
    timeout_minutes: PositiveFloat = 60.0
    """Longest wait of a rank for the others, at the start, in a collective and while rank 0 alone
    works (servers that sample, downloads); after it the job ends with an error."""

    @model_validator(mode="after")
    def _check_offload(self) -> "DeepSpeedSection":
        places = (self.offload_optimizer, self.offload_param)
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(
                f"offload_param needs stage 3, not {self.stage}: it is what shards parameters"
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
    gold: FunctionName | None = None
    """`module:function`, or `FOLDER/module:function`: the true reward, if known. In the forms of
    ppo.rewards: (prompt, response) to a float, or (prompts, completions, **columns) to a list."""
    label_scale: PositiveFloat | None = None
    """With gold: labels were drawn with probability sigmoid(label_scale * gold difference), so the
    best accuracy that any reward model can have (the Bayes limit) is known."""


class WandbSection(Section):
    """Weights & Biases: a run for each stage, in one group."""

    project: str = "chatllama"
    """Project there."""
    entity: str | None = None
    """User or team. null: your default."""
    name: str | None = None
    """Name of the group; the stage is added to it for each run's. null: the run folder's name."""
    tags: list[str] = []
    """Tags of each run."""
    notes: str | None = None
    """Notes of each run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline: into RUN/<stage>/wandb, for `wandb sync`. null: WANDB_MODE, or online."""


class TrackingSection(Section):
    """Progress display, metrics and samples."""

    report_to: list[str] = ["tensorboard"]
    """Trackers besides metrics.jsonl: tensorboard, wandb (needs the extra of that name)."""
    wandb: WandbSection = WandbSection()
    """How runs are named at Weights & Biases."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl and trackers."""
    sample_every: NonNegative = 10
    """PPO steps between printed samples. 0: none."""


class Config(Section):
    """The whole YAML."""

    run_dir: FilePath
    """Folder of everything that the run writes. This and other relative paths count from the folder
    in which a command is started; the run folder's own config.yaml holds them absolute."""
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    """Seed of data order, splits, initial weights and sampling."""
    deterministic: bool = False
    """On GPUs, train with kernels that repeat bit for bit, as they do on the CPU anyway: a resumed
    run then ends with the same weights. Slower, attention's backward pass most (not measured on a
    GPU yet). Not with backbone.liger_kernel."""
    backbone: BackboneSection
    """The LLaMA that all roles share."""
    chat: ChatSection = ChatSection()
    """How a conversation becomes tokens."""
    lora: LoraSection | None = LoraSection()
    """Adapters of all roles. null: SFT trains all weights, and its result becomes the base."""
    later_lora: LoraSection | None = None
    """With `lora: null`: the adapters of the reward and PPO stages (null: the defaults)."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    """ZeRO settings."""
    sft: SftSection = SftSection()
    """Stage 1. A stage without data or adapter is left out; `sft: null` leaves out one that
    `extends` brings. Without SFT the later stages start from the backbone itself."""
    reward: RewardSection = RewardSection()
    """Stage 2. Only needed where a term of ppo.rewards is `adapter: run`."""
    ppo: PpoSection = PpoSection()
    """Stage 3."""
    generation: GenerationSection = GenerationSection()
    """How PPO's rollouts are sampled."""
    evaluation: EvaluationSection = EvaluationSection()
    """The final evaluation."""
    tracking: TrackingSection = TrackingSection()
    """Progress display, metrics and samples."""

    @field_validator("sft", "reward", "ppo", mode="before")
    @classmethod
    def _left_out(cls, section: object) -> object:
        return {} if section is None else section

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
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
        if self.deterministic and self.backbone.liger_kernel:
            raise ValueError(
                "deterministic: backbone.liger_kernel is on, and nobody has shown that Liger's "
                "kernels repeat bit for bit; use one of the two"
            )
        if self.lora is None and self.ppo.reference_refresh_every:
            raise ValueError(
                "ppo.reference_refresh_every needs a reference adapter; with `lora: null` the "
                "reference is the base itself"
            )
        if self.generation.compile is True and self.against_compiling is not None:
            raise ValueError(f"generation.compile: {self.against_compiling}")
        return self

    @property
    def trained_stages(self) -> tuple[StageName, ...]:
        """The stages that have data, in order."""
        sections: dict[StageName, StageSection] = {
            "sft": self.sft,
            "reward": self.reward,
            "ppo": self.ppo,
        }
        return tuple(stage for stage, section in sections.items() if section.data)

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages that the run has, trained or given as an adapter; others are left out."""
        given: dict[StageName, str | None] = {
            "sft": self.sft.adapter,
            "reward": self.reward.adapter,
            "ppo": None,
        }
        trained = self.trained_stages
        return tuple(stage for stage in given if stage in trained or given[stage] is not None)

    @property
    def starts_from_sft(self) -> bool:
        """Whether later stages start from SFT's adapter; else from a base without adapter."""
        return self.lora is not None and "sft" in self.stages

    @property
    def against_compiling(self) -> str | None:
        """Why the decoding step of rollouts cannot be compiled; None if it can."""
        if self.backbone.against_compiling is not None:
            return self.backbone.against_compiling
        if self.backbone.liger_kernel:
            return (
                "backbone.liger_kernel is on, and no compiled step has been tried with Liger's "
                "kernels; use one of the two"
            )
        if self.deepspeed.stage == 3:
            return (
                "deepspeed.stage 3 gathers the weights at other addresses in every rollout; use "
                "stage 2 or less, or do not compile"
            )
        return self.generation.against_compiling

    def compiles_rollouts(self, with_triton: bool) -> bool:
        """What `generation.compile` comes to on a machine with or without a GPU and Triton."""
        if self.generation.compile == "auto":
            return with_triton and self.against_compiling is None
        return self.generation.compile

    @property
    def adapter_lora(self) -> LoraSection:
        """The adapter shape of the reward and PPO stages."""
        return self.lora or self.later_lora or LoraSection()


def with_weights(cfg: "Config", dtype: str | None, quantization: str | None) -> "Config":
    """The config with the backbone's weights in another form, for inference; None changes nothing.

    dtype may be float16 too. No YAML may ask for it, because its gradients would underflow.
    """
    changes = {"dtype": dtype, "quantization": quantization}
    wanted = {key: value for key, value in changes.items() if value is not None}
    return cfg.model_copy(update={"backbone": cfg.backbone.model_copy(update=wanted)})
