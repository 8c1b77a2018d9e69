"""The `chatllama` command: what can be typed. The work is in the module that each command names.

Those modules are imported inside the functions, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from chatllama import __version__

Command = Callable[[argparse.Namespace], None]
USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command: 0, 2 for the user's mistakes, 130 after Ctrl-C, or a stage's own.

    Args:
        argv: the arguments after `chatllama`. None: this process's.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    command: Command = arguments.command
    try:
        command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`); Python must not complain again at exit.
        sys.stdout = None
        return 0
    except (ValueError, FileNotFoundError) as error:
        if arguments.debug:
            raise
        print(f"chatllama: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ends the process with code 2 and a usage line if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="chatllama",
        description="RLHF for LLaMA: SFT, reward model and PPO on one frozen backbone.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"chatllama {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = _add(commands, "run", _run, "train: SFT, reward model, PPO; then evaluation and report")
    _add_run_arguments(run)
    chat = _add(commands, "chat", _chat, "talk to the model of a run in the terminal")
    _add_chat_arguments(chat)
    report = _add(commands, "report", _report, "write report.html of a run, finished or not")
    report.add_argument("run", metavar="RUN", help="run folder")
    # argparse cannot take overrides that stand after an option; they come back as unknown words.
    arguments, unknown = parser.parse_known_args(argv)
    takes_overrides = arguments.command is _run
    if unknown and (not takes_overrides or any(word.startswith("-") for word in unknown)):
        wrong = unknown if not takes_overrides else [w for w in unknown if w.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if takes_overrides:
        arguments.overrides = [*arguments.overrides, *unknown]
    return arguments


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    help: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.set_defaults(command=command)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="settings that replace those of the file",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of an interrupted stage",
    )
    parser.add_argument(
        "--from",
        dest="redo_from",
        choices=("sft", "reward", "ppo"),
        help="do this stage and the later ones again; their results and checkpoints are removed",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes on this machine (default: all GPUs; without one, up to 2 on the CPU)",
    )
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="machines, `name slots=N` a line"
    )
    parser.add_argument(
        "--master-port", type=int, metavar="P", help="port of rank 0 (default: a free one)"
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--role",
        choices=("base", "sft", "policy"),
        help="who answers (default: the newest that is there)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9, help="1: all tokens")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: the config's)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the config's)")
    parser.add_argument("--seed", type=int, help="for answers that can be repeated")


def _run(arguments: argparse.Namespace) -> None:
    from chatllama.launcher import Launch
    from chatllama.pipeline import StageFailed, run_pipeline

    launch = Launch(arguments.num_gpus, arguments.hostfile, arguments.master_port)
    try:
        run_pipeline(
            arguments.config,
            arguments.overrides,
            launch=launch,
            resume=arguments.resume,
            redo_from=arguments.redo_from,
        )
    except StageFailed as error:
        print(f"chatllama: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def _chat(arguments: argparse.Namespace) -> None:
    from chatllama.chat import chat

    chat(
        Path(arguments.run),
        role=arguments.role,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_new_tokens=arguments.max_new_tokens,
        system=arguments.system,
        seed=arguments.seed,
    )


def _report(arguments: argparse.Namespace) -> None:
    from chatllama.report import write_report
    from chatllama.run_folder import RunFolder

    print(write_report(RunFolder(Path(arguments.run))))


if __name__ == "__main__":
    raise SystemExit(main())
