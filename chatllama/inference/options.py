"""What `chatllama generate` was asked for, checked and completed from the run's config.

Nothing here loads a model: mistakes are told at once.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chatllama.inference.prompt_files import Prompt
from chatllama.runs.folder import RunFolder

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config.schema import Config

GenerationRole = Literal["base", "sft", "policy", "ema"]
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Options:
    """What the user asks for; None leaves it to the run's config (`generation`)."""

    role: GenerationRole | None = None
    """None: the policy if there is one, else the SFT model."""
    temperature: float | None = None
    """0 takes the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    """Answers at a time; changes answers by rounding only (near-ties in half precision)."""
    seed: int = 0
    stops: tuple[str, ...] = ()
    num_samples: int = 1
    """Answers kept for each prompt."""
    best_of: int | None = None
    """Samples of which the one that the reward model likes best is kept."""
    token_ids: bool = False
    logprobs: bool = False
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16. None: that of `backbone`."""
    quantization: str | None = None
    """Of the frozen weights: none, int8 or nf4. None: that of `backbone`."""
    compile: bool = False
    """The decode step is compiled; changes answers by rounding only."""


@dataclass(frozen=True)
class Plan:
    """Options with every value in place, and the adapters that they need."""

    role: GenerationRole
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    batch_size: int
    compile: bool
    seed: int
    stops: tuple[str, ...]
    drawn: int
    """Samples drawn for each prompt."""
    kept: int
    """Answers written for each prompt."""
    token_ids: bool
    logprobs: bool
    dtype: str
    quantization: str
    adapter: Path | None
    rewards: list[Path]

    def settings(self, run: RunFolder, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What determines the answers, as JSON values."""
        values = asdict(self) | {
            "run": str(run.root.resolve()),
            "prompts": digest([prompt.messages for prompt in prompts]),
        }
        del values["batch_size"], values["compile"]
        values["adapter"] = _digest_adapter(self.adapter) if self.adapter else None
        values["rewards"] = [_digest_adapter(folder) for folder in self.rewards]
        return values


def make_plan(run: RunFolder, cfg: "Config", options: Options) -> Plan:
    """The options completed from the config, and the adapters found in the run.

    Raises:
        ValueError: the run has no such role, or no reward model to choose the best answer with, or
            its model cannot be compiled.
    """
    from chatllama.config.schema import with_weights

    section, backbone = cfg.generation, cfg.backbone
    if options.compile:
        loaded = with_weights(cfg, options.dtype, options.quantization).backbone
        if loaded.against_compiling is not None:
            raise ValueError(f"--compile: {loaded.against_compiling}")
    role, adapter = find_role(run, cfg, options.role)
    rewards = run.reward_members() if run.reward_adapter.is_dir() else []
    best_of = options.best_of
    if best_of is not None and not rewards:
        raise ValueError(f"--best-of {best_of}: {run.root} has no reward model to choose with")
    temperature = section.temperature if options.temperature is None else options.temperature
    drawn = best_of or options.num_samples
    if temperature == 0 and drawn > 1:
        name = "--n" if best_of is None else "--best-of"
        raise ValueError(f"{name} {drawn} with temperature 0 would give {drawn} equal answers")
    return Plan(
        role=role,
        temperature=temperature,
        top_p=section.top_p if options.top_p is None else options.top_p,
        top_k=section.top_k if options.top_k is None else options.top_k,
        max_new_tokens=options.max_new_tokens or section.max_new_tokens,
        batch_size=options.batch_size or section.batch_size,
        compile=options.compile,
        seed=options.seed,
        stops=options.stops,
        drawn=drawn,
        kept=options.num_samples,
        token_ids=options.token_ids,
        logprobs=options.logprobs,
        dtype=options.dtype or backbone.dtype,
        quantization=options.quantization or backbone.quantization,
        adapter=adapter,
        rewards=rewards,
    )


def find_role(
    run: RunFolder, cfg: "Config", role: GenerationRole | None
) -> tuple[GenerationRole, Path | None]:
    """The role that answers and its adapter; the base, and SFT of all weights, have none."""
    if role is None:
        role = "policy" if run.policy_adapter.is_dir() else "sft"
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


def check_options(options: Options) -> None:
    """Nothing, for options that can be followed whatever the run.

    Raises:
        ValueError: names the first that cannot.
    """
    temperature, top_p = options.temperature, options.top_p
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature {temperature}: must be 0 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p}: must be above 0 and at most 1")
    for name, value, least in (
        ("--top-k", options.top_k, 0),
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--batch-size", options.batch_size, 1),
        ("--seed", options.seed, 0),
        ("--n", options.num_samples, 1),
        ("--best-of", options.best_of, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} {value}: must be at least {least}")
    if options.best_of is not None and options.num_samples > 1:
        raise ValueError(
            f"--n {options.num_samples} and --best-of {options.best_of}: give one of the two"
        )
    check_stops(options.stops)


def check_stops(stops: Sequence[str]) -> None:
    """Nothing, for strings that may end an answer.

    Raises:
        ValueError: one of them is empty.
    """
    if "" in stops:
        raise ValueError("--stop '': an empty string would end every answer at once")


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
