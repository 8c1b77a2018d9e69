"""The `chatllama` command: its arguments. The work is in the module that each command names.

Those modules are imported inside the functions, so that `--help` is fast.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from chatllama import __version__
from chatllama.exporting.cli import ExportOptions, add_export_arguments
from chatllama.inference.cli import add_chat_arguments, add_generate_arguments
from chatllama.inference.evaluation.cli import SuiteOptions, add_eval_arguments
from chatllama.inference.options import TRUST, ChatOptions, GenerateOptions
from chatllama.planning.cli import add_plan_arguments
from chatllama.runs.folder import STAGES, Stage
from chatllama.runtime.command_line import (
    Command,
    Parser,
    add_command,
    add_config_arguments,
    shown_only,
    tell,
)
from chatllama.runtime.declared_options import options_from
from chatllama.runtime.gpu import let_memory_grow
from chatllama.serving.settings import add_serve_arguments, serve_settings
from chatllama.start.cli import (
    add_configs_commands,
    add_runs_arguments,
    configs,
    env,
    no_arguments,
    runs,
)

ABOUT = "RLHF for LLaMA: SFT, reward model and PPO on one frozen backbone."
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command: 0, 2 for a user's mistake, 130 after Ctrl-C, or a stage's own.

    Without arguments it shows what there is.
    """
    let_memory_grow()
    words = sys.argv[1:] if argv is None else argv
    arguments = _parse(words) if words else argparse.Namespace(command=_home, debug=False)
    command: Command = arguments.command
    # Where stdout is the result, a reader that has closed the pipe ends the command.
    shown = ("stderr",) if command in (_chat, _generate) else ("stdout", "stderr")
    with shown_only(*shown):
        try:
            command(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            sys.stdout = None  # else Python reports it again at exit
        except (ValueError, OSError) as error:
            if arguments.debug:
                raise
            tell(f"chatllama: {error}")
            return USER_ERROR
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ends the process with code 2 and a usage line if they make no sense."""
    parser = Parser(prog="chatllama", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"chatllama {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for table in COMMANDS.values():
        for name, command, add_arguments, about in table:
            add_arguments(add_command(commands, name, command, about))
    # argparse cannot take positionals that stand after an option; they come back as unknown words.
    arguments, unknown = parser.parse_known_args(argv)
    rest: str | None = arguments.rest
    wrong = [word for word in unknown if rest is None or word.startswith("-")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest is not None:
        setattr(arguments, rest, [*vars(arguments)[rest], *unknown])
    return arguments


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    from data.cli import add_data_commands

    add_data_commands(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add = parser.add_argument
    about = (
        "go on from the newest checkpoint of an interrupted stage, with any number of ranks and "
        "under any ZeRO stage"
    )
    add("--resume", action="store_true", help=about)
    about = "do this stage and the later ones again; their results and checkpoints are removed"
    add("--from", dest="redo_from", choices=("sft", "reward", "ppo"), help=about)
    about = "run these stages alone, as in --only sft,ppo (default: all that the config has)"
    add("--only", type=_stages, metavar="STAGES", default=STAGES, help=about)
    about = "processes on this machine (default: all GPUs; without one, up to 2 on the CPU)"
    add("--num-gpus", type=int, metavar="N", help=about)
    add("--hostfile", type=Path, metavar="FILE", help="machines, `name slots=N` a line")
    add("--master-port", type=int, metavar="P", help="port of rank 0 (default: a free one)")
    about = (
        "start only the processes of line R (from 0) of the hostfile, without ssh: for Slurm, or "
        "by hand on every machine (docs/multinode.md)"
    )
    add("--node-rank", type=int, metavar="R", help=about)
    add("--master-addr", metavar="HOST", help="the hostfile's first machine")


def _stages(text: str) -> tuple[Stage, ...]:
    """The stages of a list with commas, in order."""
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in STAGES]:
        known = ", ".join(STAGES)
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no stage; known: {known}")
    return tuple(stage for stage in STAGES if stage in names)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = (
        "Meta's folder (params.json, consolidated.NN.pth and, there or one above, tokenizer.model) "
        "or a LLaMA's GGUF file (extra: gguf), whose weights are dequantised"
    )
    add("source", metavar="FOLDER|FILE.gguf", type=Path, help=about)
    add(
        "--out", type=Path, metavar="FOLDER", help="new folder (default: the source's name and -hf)"
    )
    types = ("keep", "float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="keep", help="type of the weights (default: keep)")
    about = "longest text, in tokens (default: the source's; Meta's files do not say: 2048)"
    add("--max-positions", type=int, metavar="N", help=about)


def _finish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    about = "step of the checkpoint (default: the newest)"
    parser.add_argument("--step", type=int, metavar="N", help=about)
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders")
    about = "the page (default: compare.html beside the first run)"
    parser.add_argument("--out", metavar="FILE.html", type=Path, help=about)


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.epilog = "section.key=value,value,... makes a run for each value, below the run_dir."
    about = "a run on each GPU at a time (default: one after another, each on all GPUs)"
    parser.add_argument("--one-per-gpu", action="store_true", help=about)


def _selftest_arguments(parser: argparse.ArgumentParser) -> None:
    add, seeds = parser.add_argument, [0, 1, 2]
    about = "of the training runs, one each (default: 0 1 2)"
    add("--seeds", type=int, nargs="+", default=seeds, metavar="N", help=about)
    add("--quick", action="store_true", help="leave the training runs out")
    about = "of the backbone (default: float32, whose limits are thousands of times narrower)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=about)


def _run(arguments: argparse.Namespace) -> None:
    from trainers.stages.launcher import Launch
    from trainers.stages.pipeline import StageFailed, run_pipeline

    names = ("num_gpus", "hostfile", "master_port", "node_rank", "master_addr")
    launch = Launch(**{name: vars(arguments)[name] for name in names})
    try:
        run_pipeline(
            arguments.config,
            arguments.overrides,
            launch=launch,
            resume=arguments.resume,
            redo_from=arguments.redo_from,
            only=arguments.only,
        )
    except StageFailed as error:
        tell(f"chatllama: {error}")
        raise SystemExit(error.exit_code) from error


def _plan(arguments: argparse.Namespace) -> None:
    from chatllama.planning.command import plan

    probed = None
    if arguments.probe:
        from trainers.stages.pipeline import StageFailed
        from trainers.stages.probe import probe_rates

        try:
            probed = probe_rates(arguments.config, arguments.overrides, arguments.gpus)
        except StageFailed as error:
            tell(f"chatllama: {error}")
            raise SystemExit(error.exit_code) from error
    plan(arguments, probed)


def _finish(arguments: argparse.Namespace) -> None:
    from trainers.stages.pipeline import StageFailed, finish_run

    try:
        finish_run(arguments.run, arguments.step, arguments.trust_remote_code)
    except StageFailed as error:
        tell(f"chatllama: {error}")
        raise SystemExit(error.exit_code) from error


def _chat(arguments: argparse.Namespace) -> None:
    from chatllama.inference.chat import chat

    chat(arguments.run, options_from(ChatOptions, arguments))


def _generate(arguments: argparse.Namespace) -> None:
    from chatllama.inference.batch import generate_command
    from chatllama.inference.prompt_files import read_prompts

    lines = None if sys.stdin.isatty() else sys.stdin
    continues = arguments.continue_final_message
    prompts = read_prompts(arguments.prompts, arguments.file, lines, continues)
    options = options_from(GenerateOptions, arguments)
    generate_command(arguments.run, prompts, options, arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    from chatllama.exporting.export import export_run

    export_run(Path(arguments.run), options_from(ExportOptions, arguments), arguments.out)


def _serve(arguments: argparse.Namespace) -> None:
    from chatllama.serving.server import serve

    serve(serve_settings(arguments))


def _import(arguments: argparse.Namespace) -> None:
    from chatllama.importing.gguf_checkpoint import import_gguf
    from chatllama.importing.meta_checkpoint import import_meta

    out, positions = arguments.out, arguments.max_positions
    convert = import_gguf if arguments.source.is_file() else import_meta
    convert(arguments.source, out, dtype=arguments.dtype, max_positions=positions)


def _eval(arguments: argparse.Namespace) -> None:
    from chatllama.inference.evaluation.command import evaluate_suite
    from chatllama.runtime.declared_options import check_limits

    options = options_from(SuiteOptions, arguments)
    check_limits(options)
    if (options.suite is None) == (arguments.translation is None):
        raise ValueError("give --suite or --translation, and not both")
    if options.suite is not None:
        evaluate_suite(arguments.run, options)
    else:
        _eval_translation(arguments)


def _eval_translation(arguments: argparse.Namespace) -> None:
    from chatllama.config.sources import language_codes
    from chatllama.inference.evaluation.translation import Translations, evaluate_translation
    from data.cli import read_requests

    if arguments.languages is None:
        raise ValueError("--translation needs --languages FROM TO")
    requests = read_requests(arguments.translation, arguments.languages)[: arguments.limit]
    name = Path(arguments.translation).name
    translations = Translations(name, requests, *language_codes(arguments.languages))
    options = options_from(GenerateOptions, arguments, temperature=0.0)
    evaluate_translation(arguments.run, translations, options)


def _report(arguments: argparse.Namespace) -> None:
    from chatllama.model.integrity import check_outputs
    from chatllama.reporting.page import write_report
    from chatllama.runs.folder import RunFolder

    run = RunFolder(arguments.run)
    check_outputs(run, fresh=False, complete=False)
    print(write_report(run))


def _compare(arguments: argparse.Namespace) -> None:
    from chatllama.reporting.compare import compare_runs

    compare_runs(arguments.runs, arguments.out)


def _sweep(arguments: argparse.Namespace) -> None:
    from trainers.stages.sweep import sweep

    sweep(arguments.config, arguments.overrides, arguments.one_per_gpu)


def _selftest(arguments: argparse.Namespace) -> None:
    # Tiny models, and the truth is computed on the CPU: a GPU would only be slower.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from trainers.selftest.run import selftest

    if not selftest(arguments.seeds, arguments.quick, arguments.dtype):
        raise SystemExit(FAILED)


def _home(arguments: argparse.Namespace) -> None:
    from chatllama.start.home import home_text

    groups = {
        heading: [(each[0], each[3]) for each in table] for heading, table in COMMANDS.items()
    }
    print(home_text(groups, Path("runs")))


COMMANDS: dict[str, tuple[tuple[str, Command, Callable[[argparse.ArgumentParser], None], str], ...]]
COMMANDS = {
    "start": (
        (
            "configs",
            configs,
            add_configs_commands,
            "the shipped configs; `copy NAME` to change one",
        ),
        ("data", _home, _data_arguments, "check a config's data, look at its tokens, make more"),
        ("plan", _plan, add_plan_arguments, "memory, tokens and time of a config before it runs"),
        ("env", env, no_arguments, "this machine: GPUs, kernels, disk, versions; for bug reports"),
        ("selftest", _selftest, _selftest_arguments, "PPO against the closed form, here and now"),
    ),
    "train": (
        ("run", _run, _run_arguments, "train: SFT, reward model, PPO; then evaluation and report"),
        ("runs", runs, add_runs_arguments, "the runs here, how far they are and what comes next"),
        ("finish", _finish, _finish_arguments, "end an interrupted stage at a checkpoint"),
        ("report", _report, _report_arguments, "write report.html of a run, finished or not"),
        ("sweep", _sweep, _sweep_arguments, "a run for each combination of values; then compare"),
        ("compare", _compare, _compare_arguments, "runs beside each other: keys, figures, tests"),
    ),
    "use": (
        ("chat", _chat, add_chat_arguments, "talk to the model of a run in the terminal"),
        ("generate", _generate, add_generate_arguments, "answer many prompts, into a file or here"),
        ("serve", _serve, add_serve_arguments, "an OpenAI-compatible API and a comparison page"),
        ("eval", _eval, add_eval_arguments, "benchmarks and translations, scored"),
        ("export", _export, add_export_arguments, "adapter, merged or reward model, GGUF files"),
        (
            "import",
            _import,
            _import_arguments,
            "Meta's checkpoint or a GGUF as a Hugging Face folder",
        ),
    ),
}
"""Heading -> name, function, declaration of arguments and description of its commands."""


if __name__ == "__main__":
    raise SystemExit(main())
