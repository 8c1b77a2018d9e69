"""The section `generation`: how PPO's rollouts are sampled, locally or by servers."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from chatllama.config.base import FilePath, NonNegative, Positive, PositiveFloat, Section
from chatllama.config.limits import LEAST_TEMPERATURE, MOST_NEW_TOKENS, MOST_TEMPERATURE, MOST_TOP_K


class ServersSection(Section):
    """Servers that sample rollouts. See docs/servers.md.

    Any OpenAI-compatible server that loads LoRA adapters while it runs: `chatllama serve` of the
    same run, or vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
    """

    urls: Annotated[list[str], Field(min_length=1)]
    """`http://HOST:PORT` of each."""
    api_key_variable: str = "CHATLLAMA_API_KEY"
    """Environment variable with the servers' bearer key; unset: no key is sent."""
    adapter_dir: FilePath | None = None
    """Folder that adapters are written to; the same path on every server. null: RUN/ppo/served."""
    requests_per_server: Positive = 64
    """Requests in flight at each server."""
    timeout: PositiveFloat = 600.0
    """Seconds for one response."""
    retries: NonNegative = 3
    """Failures in a row, beyond the first, after which a server is dropped from the pool."""
    max_logprob_gap: PositiveFloat = 0.05
    """Nats: mean difference between the servers' log-probabilities and the trainer's over the
    tokens of a rollout batch. More stops the run: weights, template or precision differ."""

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

    max_new_tokens: Annotated[int, Field(gt=0, le=MOST_NEW_TOKENS)] = 256
    """Longest response, in tokens."""
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)] = 1.0
    """Divisor of the logits, in sampling and in every log-probability."""
    top_k: Annotated[int, Field(ge=0, le=MOST_TOP_K)] = 0
    """Sample from the k likeliest tokens only. 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens of this total probability only. 1: all."""
    batch_size: Positive = 64
    """Responses sampled at a time, on one rank."""
    merge_lora: Literal["auto", "always", "never"] = "auto"
    """Sample PPO's rollouts with the adapter merged into a second copy of the matrices that it
    changes (which takes their memory again while sampling; the base does not change). auto: if the
    base is float32 and neither quantised nor sharded, since bfloat16 rounds the sum, and the
    step is not compiled. always is refused with a quantised base, ZeRO-3 or `compile: true`."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoding step of PPO's rollouts (torch.compile; on a GPU with CUDA graphs). auto:
    on a GPU, where it can be done and `merge_lora` is not always.
    Takes about a minute before the first step of each role, and again when a prompt is much longer
    than all before. Needs a C++ compiler (on a GPU Triton), sdpa or varlen attention, ZeRO 0 to 2,
    and neither quantisation nor Liger's kernels; the KV cache of rollouts stays allocated during
    updates. Changes responses by rounding only."""
    engine: Literal["local", "server"] = "local"
    """What samples PPO's rollouts: the trainer itself, or `servers`."""
    servers: ServersSection | None = None
    """With `engine: server`: their addresses and limits."""

    @model_validator(mode="after")
    def _servers(self) -> "GenerationSection":
        server = self.engine == "server"
        if server != (self.servers is not None):
            raise ValueError("engine server and servers go together: give both or neither")
        if server and self.merge_lora == "always":
            raise ValueError("merge_lora always: with engine server nothing is sampled here")
        if self.compile is True and self.against_compiling is not None:
            raise ValueError(self.against_compiling)
        if server and (self.top_k or self.top_p < 1):
            raise ValueError(
                "engine server: top_k must be 0 and top_p 1, or the servers' log-probabilities "
                "cannot be compared with the trainer's"
            )
        return self

    @property
    def against_compiling(self) -> str | None:
        """Why the decoding step cannot be compiled, as far as this section says; None if it can."""
        if self.engine == "server":
            return "compile: with engine server nothing is sampled here"
        if self.merge_lora == "always":
            return (
                "merge_lora always: the sums would have other addresses in every rollout, and a "
                "compiled step (compile) would be recorded again each time; use auto or never"
            )
        return None
