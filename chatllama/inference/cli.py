"""The arguments of `chatllama generate`, `chat` and `eval`. Imports nothing heavy."""

import argparse
from pathlib import Path

from chatllama.inference.options import OPENED, ChatOptions, GenerateOptions
from chatllama.runtime.declared_options import add_options

EVAL_OPTIONS = (
    "role",
    "max_new_tokens",
    "batch_size",
    "dtype",
    "quantization",
    "trust_remote_code",
)


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


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run folder")
    about = (
        "pairs in any format, or two aligned files without their endings (news for news.de and "
        "news.en)"
    )
    add("--translation", required=True, metavar="FILE", help=about)
    about = "language codes, such as de en"
    add("--languages", nargs=2, required=True, metavar=("FROM", "TO"), help=about)
    add_options(parser, GenerateOptions, EVAL_OPTIONS)
    add("--limit", type=int, metavar="N", help="the first N sentences only")
    parser.epilog = "Answers and scores go to RUN/translation; what was interrupted is continued."


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    parser.add_argument("run", metavar="RUN", type=Path, help=OPENED)
    add_options(parser, ChatOptions)
