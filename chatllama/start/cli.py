"""Arguments of `init`, `configs`, `runs` and `env`; the work is in the modules beside this one."""

import argparse
from pathlib import Path

from chatllama.runtime.command_line import add_command


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `init` would ask for."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder or hub id")
    about = "conversations, pairs or prompts, in any format; again for more"
    add("--data", metavar="FILE", action="append", default=[], help=about)
    about = "sft; ppo: also a reward model from pairs, and PPO; grpo: with a reward function"
    add("--goal", choices=("sft", "ppo", "grpo"), help=about)
    add("--reward", metavar="MODULE:FUNCTION", help="of (prompt, answer), for grpo")
    add("--gpu-memory", metavar="SIZE", help="such as 24GB; `none`: CPU (default: this machine's)")
    add("--out", type=Path, metavar="F.yaml", help="the new config (default: MODEL-GOAL.yaml)")


def add_configs_commands(parser: argparse.ArgumentParser) -> None:
    """Declares `configs` and `configs copy`."""
    parser.set_defaults(name=None)
    inner = parser.add_subparsers(title="commands", metavar="COMMAND")
    copy = add_command(inner, "copy", configs, "copy a shipped config, to change it")
    copy.add_argument("name", metavar="NAME", help="as `chatllama configs` lists it")
    here = Path()
    copy.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=here, help="(.)")


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the folder that `runs` searches."""
    about = "searched, three levels deep (default: runs)"
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, nargs="?", default="runs", help=about
    )


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares nothing."""


def configs(arguments: argparse.Namespace) -> None:
    """Lists the shipped configs, or copies one."""
    from chatllama.start.configs import copy_config, list_configs

    if arguments.name is None:
        print(list_configs())
        return
    copied = copy_config(arguments.name, arguments.folder)
    print("\n".join(f"written: {file}" for file in copied))


def runs(arguments: argparse.Namespace) -> None:
    """Lists the runs below a folder."""
    from chatllama.start.runs import list_runs

    print(list_runs(arguments.folder))


def env(arguments: argparse.Namespace) -> None:
    """Prints the report about this machine."""
    from chatllama.start.env import env_lines

    for line in env_lines():
        print(line, flush=True)
