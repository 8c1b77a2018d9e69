"""The `chatllama` command: what can be typed. The work is in the module that each command names.

Those modules are imported inside the functions, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from chatllama import __version__
from chatllama.exporting.cli import add_export_arguments, export_options
from chatllama.inference.cli import (
    add_chat_arguments,
    add_eval_arguments,
    add_generate_arguments,
    chat_settings,
    eval_options,
    generate_options,
)
from chatllama.runtime.command_line import Command, add_command, add_config_arguments
from chatllama.serving.settings import add_serve_arguments, serve_settings

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


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
    from data.cli import add_data_commands

    parser = argparse.ArgumentParser(
        prog="chatllama",
        description="RLHF for LLaMA: SFT, reward model and PPO on one frozen backbone.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"chatllama {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = add_command(
        commands, "run", _run, "train: SFT, reward model, PPO; then evaluation and report"
    )
    _add_run_arguments(run)
    chat = add_command(commands, "chat", _chat, "talk to the model of a run in the terminal")
    add_chat_arguments(chat)
    generate = add_command(
        commands, "generate", _generate, "answer many prompts, into a file or here"
    )
    add_generate_arguments(generate)
    export = add_command(
        commands, "export", _export, "adapter, merged model, reward model, GGUF files"
    )
    add_export_arguments(export)
    serve = add_command(
        commands, "serve", _serve, "an OpenAI-compatible API, and a page to compare on"
    )
    add_serve_arguments(serve)
    import_ = add_command(
        commands, "import", _import, "make a Hugging Face folder of Meta's checkpoint"
    )
    _add_import_arguments(import_)
    eval_ = add_command(commands, "eval", _eval, "score a run's translations with sacrebleu")
    add_eval_arguments(eval_)
    report = add_command(commands, "report", _report, "write report.html of a run, finished or not")
    report.add_argument("run", metavar="RUN", help="run folder")
    about = "check the data of a config, look at its tokens, or make more of it"
    data = commands.add_parser("data", help=about, description=about, allow_abbrev=False)
    add_data_commands(data.add_subparsers(title="commands", metavar="COMMAND", required=True))
    selftest = add_command(
        commands, "selftest", _selftest, "PPO against the closed form, here and now"
    )
    _add_selftest_arguments(selftest)
    generate.set_defaults(rest="prompts")
    # argparse cannot take positionals that stand after an option; they come back as unknown words.
    arguments, unknown = parser.parse_known_args(argv)
    rest: str | None = arguments.rest
    wrong = [word for word in unknown if rest is None or word.startswith("-")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest is not None:
        setattr(arguments, rest, [*vars(arguments)[rest], *unknown])
    return arguments


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of an interrupted stage, with any number of ranks "
        "and under any ZeRO stage",
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
    parser.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="start only the processes of line R (from 0) of the hostfile, without ssh: for Slurm, "
        "or by hand on every machine (docs/multinode.md)",
    )
    parser.add_argument("--master-addr", metavar="HOST", help="the hostfile's first machine")


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folder",
        metavar="META_FOLDER",
        type=Path,
        help="with params.json, consolidated.NN.pth and, there or one above, tokenizer.model",
    )
    add("--out", type=Path, metavar="FOLDER", help="new folder (default: META_FOLDER-hf)")
    add(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="type of the weights (default: keep)",
    )
    add(
        "--max-positions",
        type=int,
        metavar="N",
        help="longest text, in tokens, which the checkpoint does not say (default: 2048)",
    )


def _add_selftest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="of the training runs, one each (default: 0 1 2)",
    )
    parser.add_argument("--quick", action="store_true", help="leave the training runs out")


def _run(arguments: argparse.Namespace) -> None:
    from data.reading.files import named_files
    from trainers.stages.launcher import Launch
    from trainers.stages.pipeline import StageFailed, run_pipeline

    launch = Launch(
        arguments.num_gpus,
        arguments.hostfile,
        arguments.master_port,
        arguments.node_rank,
        arguments.master_addr,
    )
    try:
        run_pipeline(
            arguments.config,
            arguments.overrides,
            launch=launch,
            resume=arguments.resume,
            redo_from=arguments.redo_from,
            find_files=named_files,
        )
    except StageFailed as error:
        print(f"chatllama: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def _chat(arguments: argparse.Namespace) -> None:
    from chatllama.inference.chat import chat

    chat(Path(arguments.run), **chat_settings(arguments))


def _generate(arguments: argparse.Namespace) -> None:
    from chatllama.inference.batch import generate_command
    from chatllama.inference.prompt_files import read_prompts

    lines = None if sys.stdin.isatty() else sys.stdin
    prompts = read_prompts(arguments.prompts, arguments.file, lines)
    generate_command(Path(arguments.run), prompts, generate_options(arguments), arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    from chatllama.exporting.export import export_run

    export_run(Path(arguments.run), export_options(arguments), arguments.out)


def _serve(arguments: argparse.Namespace) -> None:
    from chatllama.serving.server import serve

    serve(serve_settings(arguments))


def _import(arguments: argparse.Namespace) -> None:
    from chatllama.importing.meta_checkpoint import import_meta

    import_meta(
        arguments.folder,
        arguments.out,
        dtype=arguments.dtype,
        max_positions=arguments.max_positions,
    )


def _eval(arguments: argparse.Namespace) -> None:
    from chatllama.config.sources import language_codes
    from chatllama.inference.translation import Translations, evaluate_translation
    from data.cli import read_requests

    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: must be at least 1")
    requests = read_requests(arguments.translation, arguments.languages)[: arguments.limit]
    name = Path(arguments.translation).name
    translations = Translations(name, requests, *language_codes(arguments.languages))
    evaluate_translation(Path(arguments.run), translations, eval_options(arguments))


def _report(arguments: argparse.Namespace) -> None:
    from chatllama.reporting.page import write_report
    from chatllama.runs.folder import RunFolder

    print(write_report(RunFolder(Path(arguments.run))))


def _selftest(arguments: argparse.Namespace) -> None:
    # Tiny models, and the truth is computed on the CPU: a GPU would only be slower.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from trainers.selftest.run import selftest

    if not selftest(arguments.seeds, arguments.quick):
        raise SystemExit(FAILED)


if __name__ == "__main__":
    raise SystemExit(main())
