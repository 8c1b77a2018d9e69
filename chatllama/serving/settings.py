"""The options of `chatllama serve`, checked before anything is loaded."""

import argparse
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from chatllama.inference.options import OPENED, WeightsOptions
from chatllama.runtime.declared_options import (
    ABOVE_0,
    Limit,
    add_options,
    at_least,
    check_limits,
    option,
    options_from,
)

KEY_VARIABLE = "CHATLLAMA_API_KEY"
LEAST_KEY = 16
PORT = Limit("must be between 0 and 65535", lambda port: 0 <= port < 65536)


@dataclass(frozen=True, kw_only=True)
class ServerSettings(WeightsOptions):
    """Where to listen, who may send requests, and how much is worked on."""

    run: Path
    host: str = option("127.0.0.1", "address to listen on (default: this machine only)")
    port: int = option(8000, "0: any free one", limit=PORT, metavar="P")
    api_keys: tuple[str, ...] = option(
        (),
        f"bearer key; may be given several times (or {KEY_VARIABLE}); needed with --host",
        metavar="KEY",
        flag="--api-key",
    )
    allow_origins: tuple[str, ...] = option(
        (),
        "web site whose pages may send requests, such as https://chat.example; may be given "
        "several times; needs a key",
        metavar="ORIGIN",
        flag="--allow-origin",
    )
    date: str | None = option(
        None, "day that the tokenizer's template writes (default: the run's)", metavar="YYYY-MM-DD"
    )
    adapter_root: Path | None = option(
        None, "the folder that /v1/load_lora_adapter may load from (default: RUN)", metavar="DIR"
    )
    votes: Path | None = option(None, "votes go here (default: RUN/votes.jsonl)", metavar="F.jsonl")
    max_rows: int = option(64, "answers decoded at a time", limit=ABOVE_0, flag="--max-concurrency")
    max_queue: int = option(256, "answers that may wait; more are refused", limit=at_least(0))
    max_tokens: int | None = option(
        None, "longest answer (default: the model's most)", limit=ABOVE_0
    )
    cache_tokens: int = option(65536, "tokens, over all answers, in the KV cache", limit=ABOVE_0)
    max_adapters: int = option(8, "adapters loaded at run time", limit=at_least(0))
    max_body: int = option(2**20, "bytes of a request", limit=ABOVE_0)
    timeout: float = option(
        300.0, "seconds for a whole answer, waiting included", limit=ABOVE_0, metavar="S"
    )
    grace: float = option(
        30.0, "seconds that answers get to finish when the server stops", limit=at_least(0),
        metavar="S",
    )  # fmt: skip
    max_connections: int = 512
    body_timeout: float = 20.0
    """Seconds for a client to send a request."""
    send_timeout: float = 60.0
    """Seconds in which a client must read some of its answer."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def votes_file(self) -> Path:
        """Where votes go; of a model of the hub, in the current folder."""
        return self.votes or (self.run if self.run.is_dir() else Path()) / "votes.jsonl"


def check_settings(settings: ServerSettings) -> None:
    """Raises ValueError for settings that a server cannot be started with."""
    if not settings.is_local and not settings.api_keys:
        raise ValueError(
            f"--host {settings.host} is open to other machines and there is no key: give "
            "--api-key KEY (or CHATLLAMA_API_KEY), or leave --host out to serve this machine only"
        )
    for key in settings.api_keys:
        # Keys travel in a header.
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"--api-key: at least {LEAST_KEY} printable ASCII characters without blanks; "
                "`openssl rand -hex 16` makes one"
            )
    for origin in settings.allow_origins:
        parts = urlsplit(origin)
        if f"{parts.scheme}://{parts.netloc}" != origin or parts.scheme not in ("http", "https"):
            raise ValueError(
                f"--allow-origin {origin}: expected http://HOST, https://HOST or one with :PORT, "
                "without a path, as browsers send it"
            )
    if settings.allow_origins and not settings.api_keys:
        raise ValueError("--allow-origin: without a key any page there could use it; --api-key KEY")
    check_limits(settings)
    root = settings.adapter_root
    if root is not None and not root.is_dir():
        raise ValueError(f"--adapter-root {root}: not a folder")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    parser.add_argument("run", metavar="RUN", type=Path, help=OPENED)
    add_options(parser, ServerSettings)


def serve_settings(arguments: argparse.Namespace) -> ServerSettings:
    """What was typed, as settings; without a key, the one in CHATLLAMA_API_KEY."""
    if not arguments.api_keys and (key := os.environ.get(KEY_VARIABLE)):
        arguments.api_keys = [key]
    return options_from(ServerSettings, arguments, run=arguments.run)
