"""The section `generation`: how PPO's rollouts are sampled, and by whom."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from chatllama.config.base import (
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
)


class ServersSection(Section):
    """Servers that sample rollouts. See docs/servers.md.

    Any OpenAI-compatible server that loads LoRA adapters while it runs: `chatllama serve` of the
    same run, or vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
    """

    urls: Annotated[list[str], Field(min_length=1)]
    """`http://HOST:PORT` of each."""
    api_key_variable: str = "CHATLLAMA_API_KEY"
    """Environment variable that holds the servers' bearer key; unset: no key is sent."""
    adapter_dir: str | None = None
    """Folder that adapters are written to, which every server must see under the same path.
    null: RUN/ppo/served."""
    requests_per_server: Positive = 64
    """Requests in flight at each server."""
    timeout: PositiveFloat = 600.0
    """Seconds for one answer."""
    retries: NonNegative = 3
    """Failures in a row after which a server is dropped from the pool, beyond the first."""
    max_logprob_gap: PositiveFloat = 0.05
    """Nats: largest mean difference between the servers' log-probabilities and the trainer's, over
    the tokens of a rollout batch. More stops the run: other weights, template or precision."""

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
                raise ValueError(f"{url!r}: expected http://HOST:PORT")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("the same address is given twice")
        return urls


class GenerationSection(Section):
    """How rollouts are sampled."""

    max_new_tokens: Positive = 256
    """Longest response, in tokens."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in every log-probability alike."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens only. 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens of this total probability only. 1: all."""
    batch_size: Positive = 64
    """Responses sampled at a time, on one rank."""
    merge_lora: Literal["auto", "always", "never"] = "auto"
    """Sample PPO's rollouts with the adapter added into a second copy of the matrices that it
    changes (their memory twice while sampling; the base itself is not touched). auto: where the
    base is float32 and whole, since in bfloat16 the sum is rounded, and not with `compile`. always
    is refused where the base is quantised or split by ZeRO-3, and with `compile`."""
    compile: bool = False
    """Compile the step of one token in PPO's rollouts (torch.compile; on a GPU with CUDA graphs).
    Takes a minute or so before the first step of each role, and where a prompt comes that is much
    longer than all before. Needs a C++ compiler (on a GPU Triton), sdpa or varlen attention,
    neither quantisation nor Liger's kernels, and ZeRO 0 to 2; the rollouts' keys and values keep
    their memory during updates. Changes responses by rounding only."""
    engine: Literal["local", "server"] = "local"
    """Who samples PPO's rollouts: the trainer itself, or `servers`."""
    servers: ServersSection | None = None
    """With `engine: server`: where they are."""

    @model_validator(mode="after")
    def _servers(self) -> "GenerationSection":
        if (self.engine == "server") != (self.servers is not None):
            raise ValueError("engine server and servers go together: give both or neither")
        if self.engine == "server" and self.merge_lora == "always":
            raise ValueError("merge_lora always: with engine server nothing is sampled here")
        if self.engine == "server" and self.compile:
            raise ValueError("compile: with engine server nothing is sampled here")
        if self.compile and self.merge_lora == "always":
            raise ValueError(
                "merge_lora always: the sums would lie elsewhere in memory in every rollout, and a "
                "compiled step (compile) would be recorded anew each time; use auto or never"
            )
        if self.engine == "server" and (self.top_k or self.top_p < 1):
            raise ValueError(
                "engine server: top_k must be 0 and top_p 1, or the servers' log-probabilities "
                "cannot be compared with the trainer's"
            )
        return self
