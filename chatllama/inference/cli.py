"""The arguments of `chatllama generate` and `chat`. Imports nothing heavy."""

import argparse
from pathlib import Path

from chatllama.inference.options import OPENED, ChatOptions, GenerateOptions
from chatllama.runtime.declared_options import add_options


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help=OPENED)
    add("prompts", metavar="PROMPT", nargs="*", help="what to answer (default: lines of stdin)")
    about = "prompts: .jsonl or .json with `prompt` or `messages`, or .txt, one a line"
    add("--file", type=Path, metavar="F", help=about)
    add_options(parser, GenerateOptions)
    add("--out", type=Path, metavar="F.jsonl", help="write here; an interrupted run is continued")
    parser.set_defaults(rest="prompts")
    parser.epilog = "Sampling settings that are left out are those of the run's `generation`."


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    parser.add_argument("run", metavar="RUN", type=Path, help=OPENED)
    add_options(parser, ChatOptions)
