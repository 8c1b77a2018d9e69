"""The words of `chatllama data generate`. Imports nothing heavy."""

import argparse
from pathlib import Path


def add_data_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add(
        "what",
        metavar="WHAT",
        choices=("prompts", "answers", "pairs"),
        help="prompts (like those of FILE), answers (to FILE's prompts), or pairs (two answers to "
        "each, and which one a judge prefers)",
    )
    add("--file", metavar="FILE", required=True, help="seeds or prompts, in any format")
    add("--format", metavar="NAME", help="of FILE (default: told from its keys)")
    add("--out", type=Path, metavar="F.jsonl", required=True, help="grows; can be continued")
    add("--url", required=True, help="an OpenAI-compatible API, such as http://127.0.0.1:8000/v1")
    add("--model", required=True, metavar="NAME", help="as the API calls it")
    add("--judge-model", metavar="NAME", help="who compares pairs (default: --model)")
    add("--num", type=int, metavar="N", help="prompts to make; or answer the first N only")
    add("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    add("--max-tokens", type=int, default=1024, metavar="N", help="of an answer (default: 1024)")
    add("--parallel", type=int, default=4, metavar="N", help="requests at a time (default: 4)")
    add("--per-minute", type=float, metavar="N", help="requests a minute at most")
    add("--retries", type=int, default=6, metavar="N", help="after 429, 5xx, no answer (default 6)")
    add(
        "--similarity",
        type=float,
        default=0.7,
        metavar="S",
        help="ROUGE-L from which a prompt is not new (default: 0.7)",
    )
    add("--seed", type=int, default=0, help="of the choice of examples (default: 0)")
    add("--price-in", type=float, metavar="USD", help="for a million tokens to the model")
    add("--price-out", type=float, metavar="USD", help="for a million tokens from it")
    add(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the API's key, if it wants one",
    )
    add("--yes", action="store_true", help="do not ask before the first request")
    parser.epilog = "What it will cost is told first. Stopped at any time, it goes on where it was."
