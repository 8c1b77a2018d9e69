"""The options of `chatllama judge`."""

from dataclasses import dataclass
from pathlib import Path

from chatllama.inference.options import (
    NEW_TOKENS,
    SEED,
    TEMPERATURE,
    GenerationRole,
    WeightsOptions,
)
from chatllama.runtime.declared_options import at_least, option
from data.synthesis.options import EndpointOptions

ROLES: tuple[GenerationRole, ...] = ("base", "sft", "policy", "ema")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(WeightsOptions, EndpointOptions):
    """What `chatllama judge` takes, beside the two sides."""

    reward: str | None = option(
        None, "judge: reward model of a run, adapter or folder", metavar="PLACE"
    )
    gold: str | None = option(
        None, "judge: a function of prompt and answer (docs/rewards.md)", metavar="MODULE:FUNCTION"
    )
    votes: Path | None = option(
        None, "judge: people, in a file of votes of `serve`; sides are its models", metavar="FILE"
    )
    judge_url: str | None = option(
        None, "judge: a model behind an OpenAI-compatible API", metavar="URL"
    )
    judge_model: str | None = option(None, "its name in the API", metavar="NAME")
    judge_prompt: Path | None = option(
        None, "text with {request}, {one} and {two} in place of ours", metavar="FILE"
    )
    judge_max_tokens: int = option(512, "of a reply of the judge", limit=at_least(1), metavar="N")
    data: str | None = option(
        None,
        "prompts, in any format, as of a config's source (default: the run's held-out ones)",
        metavar="FILE",
    )
    limit: int | None = option(None, "the first N prompts only", limit=at_least(1))
    temperature: float | None = option(None, **TEMPERATURE)
    max_new_tokens: int | None = option(
        None, "longest answer (default: the config's)", limit=NEW_TOKENS
    )
    seed: int = option(0, "of the answers' random numbers", limit=SEED)
    batch_size: int | None = option(None, "rows at a time", limit=at_least(1))
    out: Path | None = option(
        None,
        "folder of answers and results (default: RUN/judged/SECOND-vs-FIRST-on-FILE)",
        metavar="DIR",
    )
