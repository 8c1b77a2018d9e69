"""How `chatllama serve` was started, checked before anything is loaded."""

import argparse
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from chatllama.inference.cli import add_weights_arguments

LEAST_KEY = 16


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, who may ask, and how much."""

    run: Path
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16. None: the config's."""
    quantization: str | None = None
    """Of the frozen weights: none, int8 or nf4. None: the config's."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_keys: tuple[str, ...] = ()
    """Bearer keys, any of which opens the API. None: open to this machine only."""
    adapter_root: Path | None = None
    """Folder that run-time adapters are loaded from. None: the run's."""
    votes: Path | None = None
    """File that votes are appended to. None: RUN/votes.jsonl."""
    max_rows: int = 64
    """Answers decoded at a time."""
    max_queue: int = 256
    """Answers that may wait; more are refused."""
    max_tokens: int | None = None
    """Longest answer anyone may ask for. None: what the model's positions allow."""
    cache_tokens: int = 65536
    """Tokens, over all answers at a time, that keys and values are kept for."""
    max_adapters: int = 8
    """Adapters loaded at run time."""
    max_body: int = 2**20
    """Bytes of a request's body."""
    max_connections: int = 512
    timeout: float = 300.0
    """Seconds for a whole answer, waiting included."""
    body_timeout: float = 20.0
    """Seconds for a client to send a request."""
    grace: float = 30.0
    """Seconds that running answers get when the server is told to stop."""

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
        """Where votes go."""
        return self.votes or self.run / "votes.jsonl"


def check_settings(settings: ServerSettings) -> None:
    """Nothing, for settings that a server can be started with.

    Raises:
        ValueError: names the first that it cannot.
    """
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
    if not 0 <= settings.port < 65536:
        raise ValueError(f"--port {settings.port}: must be between 0 and 65535")
    for name, value in (
        ("--max-concurrency", settings.max_rows),
        ("--max-tokens", 1 if settings.max_tokens is None else settings.max_tokens),
        ("--cache-tokens", settings.cache_tokens),
        ("--max-body", settings.max_body),
        ("--timeout", settings.timeout),
    ):
        if value <= 0:
            raise ValueError(f"{name} {value}: must be above 0")
    for name, value in (
        ("--max-queue", settings.max_queue),
        ("--max-adapters", settings.max_adapters),
        ("--grace", settings.grace),
    ):
        if value < 0:
            raise ValueError(f"{name} {value}: must be 0 or more")
    root = settings.adapter_root
    if root is not None and not root.is_dir():
        raise ValueError(f"--adapter-root {root}: not a folder")


KEY_VARIABLE = "CHATLLAMA_API_KEY"


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    default = ServerSettings(Path())
    add("run", metavar="RUN", help="run folder")
    add("--host", default=default.host, help="address to listen on (default: this machine only)")
    add_weights_arguments(parser)
    add("--port", type=int, default=default.port, metavar="P", help="0: any free one")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"bearer key; may be given several times (or {KEY_VARIABLE}); needed with --host",
    )
    add(
        "--adapter-root",
        type=Path,
        metavar="DIR",
        help="the folder that /v1/load_lora_adapter may load from (default: RUN)",
    )
    add("--votes", type=Path, metavar="F.jsonl", help="votes go here (default: RUN/votes.jsonl)")
    for name, value, help in (
        ("--max-concurrency", default.max_rows, "answers decoded at a time"),
        ("--max-queue", default.max_queue, "answers that may wait"),
        ("--cache-tokens", default.cache_tokens, "tokens whose keys and values are kept"),
        ("--max-adapters", default.max_adapters, "adapters loaded at run time"),
        ("--max-body", default.max_body, "bytes of a request"),
    ):
        add(name, type=int, default=value, metavar="N", help=f"{help} (default: {value})")
    add("--max-tokens", type=int, metavar="N", help="longest answer (default: the model's most)")
    for name, value, help in (
        ("--timeout", default.timeout, "seconds for a whole answer"),
        ("--grace", default.grace, "seconds that answers get to finish when the server stops"),
    ):
        add(name, type=float, default=value, metavar="S", help=f"{help} (default: {value:g})")


def serve_settings(arguments: argparse.Namespace) -> ServerSettings:
    """What was typed, as settings."""
    keys = list(arguments.api_key)
    if not keys and (key := os.environ.get(KEY_VARIABLE)):
        keys = [key]
    return ServerSettings(
        run=Path(arguments.run),
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        host=arguments.host,
        port=arguments.port,
        api_keys=tuple(keys),
        adapter_root=arguments.adapter_root,
        votes=arguments.votes,
        max_rows=arguments.max_concurrency,
        max_queue=arguments.max_queue,
        max_tokens=arguments.max_tokens,
        cache_tokens=arguments.cache_tokens,
        max_adapters=arguments.max_adapters,
        max_body=arguments.max_body,
        timeout=arguments.timeout,
        grace=arguments.grace,
    )
