"""The `chatllama` command: its arguments. The work is in the module that each command names.

Those modules are imported inside the functions, so that `--help` is fast.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from chatllama import __version__
from chatllama.config.nearest import did_you_mean
from chatllama.exporting.cli import ExportOptions, add_export_arguments, add_push_arguments
from chatllama.importing.cli import add_import_arguments
from chatllama.inference.cli import add_chat_arguments, add_generate_arguments
from chatllama.inference.evaluation.cli import SuiteOptions, add_eval_arguments, check_suite
from chatllama.inference.options import TRUST, ChatOptions, GenerateOptions
from chatllama.planning.cli import add_plan_arguments
from chatllama.runtime.command_line import Command, Parser, add_command, shown_only, tell
from chatllama.runtime.declared_options import options_from
from chatllama.runtime.gpu import let_memory_grow
from chatllama.runtime.waiting import doing
from chatllama.serving.settings import add_serve_arguments, serve_settings
from chatllama.start.cli import (
    add_configs_commands,
    add_init_arguments,
    add_runs_arguments,
    configs,
    env,
    no_arguments,
    runs,
)
from chatllama.start.training_cli import (
    add_compare_arguments,
    add_report_arguments,
    add_run_arguments,
    add_selftest_arguments,
    add_sweep_arguments,
)

ABOUT = "RLHF for LLaMA: SFT, reward model and PPO on one frozen backbone."
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command: 0, 2 for a user's mistake, 130 after Ctrl-C, or a stage's own.

    Without arguments it shows what there is.
    """
    let_memory_grow()
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    command: Command = arguments.command
    # Where stdout is the result, a reader that has closed the pipe ends the command.
    shown = ("stderr",) if command in (_chat, _generate) else ("stdout", "stderr")
    # These say what they do themselves: they read lines, or run until they are stopped.
    own = command in (_chat, _generate, _serve)
    with shown_only(*shown), nullcontext() if own else doing("working", at_once=False):
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
    if not argv:
        return argparse.Namespace(command=_home, debug=False)
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
        flags = re.findall(r"--[\w-]+", commands.choices[argv[0]].format_help())
        parser.error(f"unrecognized arguments: {' '.join(wrong)}{did_you_mean(wrong[0], flags)}")
    if rest is not None:
        setattr(arguments, rest, [*vars(arguments)[rest], *unknown])
    return arguments


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    from data.cli import add_data_commands

    add_data_commands(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))


def _finish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    about = "step of the checkpoint (default: the newest)"
    parser.add_argument("--step", type=int, metavar="N", help=about)
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST)


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


def _init(arguments: argparse.Namespace) -> None:
    from chatllama.start.fit import gpu_fit
    from data.first_config import Wishes, init

    given = {name: vars(arguments)[name] for name in ("model", "goal", "reward", "out")}
    init(Wishes(data=tuple(arguments.data), **given), gpu_fit(arguments.gpu_memory))


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


def _push(arguments: argparse.Namespace) -> None:
    from chatllama.exporting.push import push

    print(push(arguments.folder, arguments.repository, arguments.private))


def _serve(arguments: argparse.Namespace) -> None:
    with doing("loading libraries"):
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
    check_suite(options)
    if options.suite == "overoptimisation":
        from chatllama.inference.evaluation.overoptimisation import evaluate_overoptimisation
        from trainers.functions.functions import gold_function

        evaluate_overoptimisation(arguments.run, options, gold_function)
    elif options.suite == "instructions":
        _eval_instructions(arguments.run, options)
    elif options.suite == "reward":
        from trainers.judging.reward_suite import evaluate_reward

        evaluate_reward(arguments.run, options)
    elif options.suite is not None:
        evaluate_suite(arguments.run, options)
    else:
        _eval_translation(arguments)


def _eval_instructions(place: Path, options: SuiteOptions) -> None:
    from chatllama.inference.evaluation.instructions import Held, evaluate_instructions
    from chatllama.inference.folders import find_model
    from data.cli import read_held_out
    from data.tokenize import fit

    _, cfg = find_model(place)
    conversations = [Held(**each) for each in read_held_out(cfg, options.data)]
    evaluate_instructions(place, options, conversations, fit)


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


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    from trainers.judging.cli import add_judge_arguments

    add_judge_arguments(parser)


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
        ("init", _init, add_init_arguments, "a config for a model, data and a goal; asks for them"),
        (
            "configs",
            configs,
            add_configs_commands,
            "the shipped configs; `copy NAME` to change one",
        ),
        ("data", _home, _data_arguments, "check a config's data, look at its tokens, make more"),
        ("plan", _plan, add_plan_arguments, "memory, tokens and time of a config before it runs"),
        ("env", env, no_arguments, "this machine: GPUs, kernels, disk, versions; for bug reports"),
        ("selftest", _selftest, add_selftest_arguments, "PPO against the closed form, right here"),
    ),
    "train": (
        ("run", _run, add_run_arguments, "SFT, reward model, PPO; then evaluation and report"),
        ("runs", runs, add_runs_arguments, "the runs here, how far they are and what comes next"),
        ("finish", _finish, _finish_arguments, "end an interrupted stage at a checkpoint"),
        ("report", _report, add_report_arguments, "write report.html of a run, finished or not"),
        ("sweep", _sweep, add_sweep_arguments, "a run for each combination of values, compared"),
        ("compare", _compare, add_compare_arguments, "runs side by side: keys, figures, tests"),
    ),
    "use": (
        ("chat", _chat, add_chat_arguments, "talk to the model of a run in the terminal"),
        ("generate", _generate, add_generate_arguments, "answer many prompts, into a file or here"),
        ("serve", _serve, add_serve_arguments, "an OpenAI-compatible API and a comparison page"),
        ("eval", _eval, add_eval_arguments, "benchmarks and translations, scored"),
        ("judge", _home, _judge_arguments, "win rate of two models, roles or files of answers"),
        ("export", _export, add_export_arguments, "adapter, merged or reward model, GGUF files"),
        ("push", _push, add_push_arguments, "an exported folder to the hub"),
        (
            "import",
            _import,
            add_import_arguments,
            "Meta's checkpoint or a GGUF as a Hugging Face folder",
        ),
    ),
}
"""Heading -> name, function, declaration of arguments and description of its commands."""


if __name__ == "__main__":
    raise SystemExit(main())
