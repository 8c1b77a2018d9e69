"""The arguments of `chatllama judge`. Imports nothing heavy."""

import argparse

from chatllama.runtime.declared_options import add_options, options_from
from trainers.judging.options import JudgeOptions


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    about = (
        "RUN, RUN:ROLE, a model, an adapter, or answers.jsonl of `generate`; of one run alone, "
        "its policy against its sft"
    )
    parser.add_argument("first", metavar="FIRST", help=about)
    parser.add_argument(
        "second", metavar="SECOND", nargs="?", help="the same: its wins are counted"
    )
    add_options(parser, JudgeOptions)
    parser.epilog = (
        "Give one judge. What an API costs is shown first; replies are kept, so that nothing is "
        "paid twice."
    )
    parser.set_defaults(command=_judge)


def _judge(arguments: argparse.Namespace) -> None:
    from trainers.judging.command import judge

    judge(arguments.first, arguments.second, options_from(JudgeOptions, arguments))
