"""Shared by the commands: their parsers, lines on stderr, text that is safe on a terminal."""

import argparse
import re
import sys
from collections.abc import Callable

Command = Callable[[argparse.Namespace], None]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with control characters replaced, so that model output cannot steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def duration(seconds: float) -> str:
    """Time for people: `9 s`, `2 min 05 s`, `3 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    help: str,
) -> argparse.ArgumentParser:
    """The parser of one subcommand, with --debug."""
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.set_defaults(command=command, rest=None)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the config file and the settings that replace those in it."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    about = "settings that replace those of the file"
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help=about)
    parser.set_defaults(rest="overrides")


def tell(text: str) -> None:
    """Prints a line of progress on stderr."""
    print(printable(text), file=sys.stderr, flush=True)
