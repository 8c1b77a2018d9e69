"""The `generation.servers` section: rollouts sampled by servers on this or other machines."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from chatllama.config_base import NonNegative, Positive, PositiveFloat, Section


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
