"""The words of `chatllama serve`, and the settings that they mean. Imports nothing heavy."""

import argparse
import os
from pathlib import Path

from chatllama.inference_weights import add_weights_arguments
from chatllama.serving.settings import ServerSettings

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
