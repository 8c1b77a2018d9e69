"""What `chatllama chat` and `generate` can be given, checked and completed from the run's config.

Nothing here loads a model, so that mistakes are reported at once.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chatllama.config.limits import (
    LEAST_TEMPERATURE,
    MOST_NEW_TOKENS,
    MOST_SEED,
    MOST_TEMPERATURE,
    MOST_TOP_K,
)
from chatllama.inference.folders import is_run
from chatllama.inference.prompt_files import Prompt
from chatllama.runs.folder import RunFolder
from chatllama.runtime.declared_options import Limit, at_least, between, check_limits, option

if TYPE_CHECKING:  # importing them takes seconds
    from chatllama.config.schema import Config
    from chatllama.generation.sampling import Sampling

GenerationRole = Literal["base", "sft", "policy", "ema"]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TEMPERATURE: dict[str, Any] = {
    "help": "0: the likeliest token",
    "limit": Limit(
        f"must be 0, or between {LEAST_TEMPERATURE:g} and {MOST_TEMPERATURE:g}",
        lambda value: value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE,
    ),
    "metavar": "T",
}
TOP_P: dict[str, Any] = {
    "help": "1: all tokens",
    "limit": Limit("must be above 0 and at most 1", lambda value: 0 < value <= 1),
    "metavar": "P",
}
NEW_TOKENS, TOP_K, SEED = (
    between(*bounds) for bounds in ((1, MOST_NEW_TOKENS), (0, MOST_TOP_K), (0, MOST_SEED))
)
SAMPLES = between(1, 10_000)
OPENED = "folder of a run, an adapter or a model, or a model's hub id"
TRUST = "run Python code that comes with the model; the run's own config cannot allow it"
STOPS = Limit("an empty string would end every answer at once", lambda stops: "" not in stops)


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """The form of the weights; None leaves it to the run's `backbone`."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of the weights (default: the config's)"
    )
    quantization: Literal["none", "int8", "nf4"] | None = option(
        None, "of the frozen weights (default: the config's; extra: bitsandbytes)"
    )
    trust_remote_code: bool = option(False, TRUST)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What every command that answers takes; None leaves it to the run's `generation`."""

    role: GenerationRole | None = option(
        None, "who answers (default: the newest of sft and policy)"
    )
    temperature: float | None = option(None, **TEMPERATURE)
    top_p: float | None = option(None, **TOP_P)
    max_new_tokens: int | None = option(
        None, "longest answer (default: the config's)", limit=NEW_TOKENS
    )
    stops: tuple[str, ...] = option(
        (),
        "ends an answer and is not in it; may be given several times",
        limit=STOPS,
        metavar="STRING",
        flag="--stop",
    )


@dataclass(frozen=True, kw_only=True)
class ChatOptions(WeightsOptions, AnswerOptions):
    """What `chatllama chat` takes."""

    temperature: float = option(0.7, **TEMPERATURE)
    top_p: float = option(0.9, **TOP_P)
    system: str | None = option(None, "system prompt (default: the config's)")
    seed: int | None = option(None, "for answers that can be repeated", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(WeightsOptions, AnswerOptions):
    """What `chatllama generate` takes, beside prompts and files."""

    top_k: int | None = option(None, "0: all tokens", limit=TOP_K, metavar="K")
    batch_size: int | None = option(
        None, "answers at a time; changes answers by rounding only", limit=at_least(1)
    )
    compile: bool = option(
        False,
        "compile the decode step: a minute or so before the first answer, then for a GPU and "
        "many prompts; changes answers by rounding only",
    )
    seed: int = option(0, "of the random numbers", limit=SEED)
    num_samples: int = option(1, "answers to each prompt", limit=SAMPLES, flag="--n")
    best_of: int | None = option(
        None, "of N samples keep the one that the reward model scores highest", limit=SAMPLES
    )
    continue_final_message: bool = option(
        False, "go on with the last message where it is the assistant's; answers are what follows"
    )
    token_ids: bool = option(False, "write the sampled token ids, too")
    logprobs: bool = option(
        False,
        "write the tokens' log-probabilities, too, at the sampling temperature (1 if it is 0)",
    )


@dataclass(frozen=True)
class Settings:
    """Options with every value in place, and the adapters that they need."""

    options: GenerateOptions
    """As given; those that the config completes are the fields below."""
    role: GenerationRole
    sampling: "Sampling"
    batch_size: int
    dtype: str
    quantization: str
    adapter: Path | None
    rewards: list[Path]

    @property
    def drawn(self) -> int:
        """Samples drawn for each prompt."""
        return self.options.best_of or self.options.num_samples

    @property
    def kept(self) -> int:
        """Answers written for each prompt."""
        return self.options.num_samples

    def saved(self, run: RunFolder, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What determines the answers, as JSON values."""
        names = ("seed", "stops", "token_ids", "logprobs")
        return {
            "run": str(run.root.resolve()),
            "prompts": digest([prompt.messages for prompt in prompts]),
            "role": self.role,
            **asdict(self.sampling),
            **{name: getattr(self.options, name) for name in names},
            "drawn": self.drawn,
            "kept": self.kept,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "adapter": _digest_adapter(self.adapter) if self.adapter else None,
            "rewards": [_digest_adapter(folder) for folder in self.rewards],
        }


def complete(run: RunFolder, cfg: "Config", options: GenerateOptions) -> Settings:
    """The options completed from the config, and the adapters found in the run.

    Raises:
        ValueError: the run has no such role, or no reward model to choose the best answer with, or
            its model cannot be compiled.
    """
    from chatllama.config.schema import with_weights

    backbone = with_weights(cfg, options.dtype, options.quantization).backbone
    if options.compile and backbone.against_compiling is not None:
        raise ValueError(f"--compile: {backbone.against_compiling}")
    role, adapter = find_role(run, cfg, options.role)
    rewards = run.reward_members() if run.reward_adapter.is_dir() else []
    if options.best_of is not None and not rewards:
        raise ValueError(
            f"--best-of {options.best_of}: {run.root} has no reward model to choose with"
        )
    names = ("temperature", "top_p", "top_k", "max_new_tokens", "batch_size")
    values = {name: getattr(cfg.generation, name) for name in names}
    values |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    drawn = options.best_of or options.num_samples
    if values["temperature"] == 0 and drawn > 1:
        name = "--n" if options.best_of is None else "--best-of"
        raise ValueError(f"{name} {drawn} with temperature 0 would give {drawn} equal answers")

    from chatllama.generation.sampling import Sampling

    size = values.pop("batch_size")
    forms = (backbone.dtype, backbone.quantization)
    return Settings(options, role, Sampling(**values), size, *forms, adapter, rewards)


def find_role(
    run: RunFolder, cfg: "Config", role: GenerationRole | None
) -> tuple[GenerationRole, Path | None]:
    """The role that answers and its adapter; the base, and SFT of all weights, have none."""
    role = role or default_role(run)
    if role == "base":
        if cfg.lora is None:
            raise ValueError("--role base: with `lora: null` SFT trained all weights; use sft")
        return role, None
    if role == "sft" and cfg.lora is None:
        folder, adapter = run.full_model, None
    else:
        folders = {"sft": run.sft_adapter, "policy": run.policy_adapter, "ema": run.ema_adapter}
        folder = adapter = folders[role]
    if not folder.is_dir():
        raise ValueError(f"--role {role}: {run.root} has none; {folder} is missing")
    return role, adapter


def default_role(run: RunFolder) -> GenerationRole:
    """The newest of policy and sft; of a plain model, the base."""
    if run.policy_adapter.is_dir():
        return "policy"
    return "sft" if run.sft_adapter.is_dir() or is_run(run) else "base"


def check_options(options: GenerateOptions) -> None:
    """Raises ValueError for options that no run can follow."""
    check_limits(options)
    if options.best_of is not None and options.num_samples > 1:
        raise ValueError(
            f"--n {options.num_samples} and --best-of {options.best_of}: give one of the two"
        )


def best_of_kl(count: int) -> float:
    """Bound on the KL of best-of-n to what the samples come from: log n - (n - 1) / n, nats.

    (Stiennon 2020, arXiv 2009.01325, appendix G.3; Gao 2022, arXiv 2210.10760, section 2; that it
    is a bound: Beirami 2024, arXiv 2401.01879.)
    """
    return math.log(count) - (count - 1) / count


def digest(value: object) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _digest_adapter(folder: Path) -> str:
    """16 hex digits of an adapter's weights."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS}; is this an adapter of a chatllama run?")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
