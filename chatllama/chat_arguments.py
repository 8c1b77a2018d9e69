"""The words of `chatllama chat`, and what they mean. Imports nothing heavy."""

import argparse
from typing import Any

from chatllama.inference_weights import add_weights_arguments


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--role",
        choices=("base", "sft", "policy", "ema"),
        help="who answers (default: the newest that is there)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9, help="1: all tokens")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: the config's)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the config's)")
    parser.add_argument("--seed", type=int, help="for answers that can be repeated")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="ends an answer and is not in it; may be given several times",
    )
    add_weights_arguments(parser)


def chat_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was typed, as keyword arguments of `chat.chat`; the run is apart."""
    return {
        "role": arguments.role,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "max_new_tokens": arguments.max_new_tokens,
        "system": arguments.system,
        "seed": arguments.seed,
        "stops": tuple(arguments.stop),
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
    }
