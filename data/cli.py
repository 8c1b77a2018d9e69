"""The `chatllama data` commands, and the records of `eval`.

What reads and shows data is imported inside the functions, so that `--help` answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatllama.runtime.command_line import add_command, add_config_arguments
from chatllama.runtime.declared_options import add_options, options_from
from chatllama.runtime.files import replace_text
from data.synthesis.options import SynthesisOptions

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config.schema import Config

STAGES = ("pretraining", "sft", "reward", "ppo")


def add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares `data generate`, `data check` and `data show`."""
    about = "prompts, answers, pairs from a model's API"
    generate = add_command(commands, "generate", _data_generate, about)
    _add_generate_arguments(generate)
    check = add_command(
        commands, "check", _data_check, "what is wrong with a config's data; 1: errors"
    )
    show = add_command(commands, "show", _data_show, "records as tokens, coloured by loss mask")
    for parser, some in ((check, "all"), (show, "sft")):
        add_config_arguments(parser)
        stages = ("sft", "reward", "ppo")
        parser.add_argument("--stage", choices=stages, help=f"the stage (default: {some})")
    check.add_argument("--fix", action="store_true", help="write cleaned copies and a log")
    check.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/data_check")
    show.add_argument("--n", type=int, default=3, metavar="N", help="records of each source")
    show.add_argument("--html", type=Path, metavar="F", help="write a page instead")


def _data_check(arguments: argparse.Namespace) -> None:
    """Prints what is wrong with a config's data and writes it; exit code 1 where there are errors.

    The exit code is that of the originals, also with --fix.
    """
    import datasets
    from rich.console import Console

    from chatllama.config.loader import load_config
    from chatllama.text.tokenizer import find_tokenizer
    from data.checking.check import examine
    from data.checking.clean import write_cleaned

    cfg = load_config(arguments.config, arguments.overrides)
    out = arguments.out or Path(cfg.run_dir) / "data_check"
    datasets.disable_progress_bars()
    console = Console(soft_wrap=True)
    stages = STAGES if arguments.stage is None else (arguments.stage,)
    examination = examine(cfg, find_tokenizer(cfg), stages)
    examination.report.show(console)
    for file in examination.report.write(out):
        console.print(f"written: {file}", markup=False)
    if arguments.fix:
        cleaned = write_cleaned(cfg, Path(arguments.config), examination, out / "cleaned")
        text = f"kept {cleaned.num_kept} records, dropped {cleaned.num_dropped} ({cleaned.log}); "
        console.print(f"{text}train with {cleaned.config}", markup=False)
    if code := examination.report.exit_code:
        raise SystemExit(code)


def _data_show(arguments: argparse.Namespace) -> None:
    """Prints the first records of a stage's sources as tokens, or writes them as a page."""
    import datasets
    from rich.console import Console

    from chatllama.config.loader import load_config
    from chatllama.text.tokenizer import find_tokenizer
    from data.checking.show import page, print_records, shown_records

    cfg = load_config(arguments.config, arguments.overrides)
    tokenizer = find_tokenizer(cfg)
    if tokenizer is None:
        raise ValueError("backbone.from_scratch has not been built yet, so there are no tokens")
    datasets.disable_progress_bars()
    shown = shown_records(cfg, tokenizer, arguments.stage or "sft", arguments.n)
    if arguments.html is None:
        print_records(shown, Console())
        return
    replace_text(arguments.html, page(shown))
    print(f"written: {arguments.html}")


def _data_generate(arguments: argparse.Namespace) -> None:
    from data.synthesis.command import generate_data

    required = {name: getattr(arguments, name) for name in ("what", "file", "out", "url", "model")}
    generate_data(options_from(SynthesisOptions, arguments, **required))


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    about = (
        "prompts (like those of FILE), answers (to FILE's prompts), or pairs (two answers to each, "
        "and which one a judge prefers)"
    )
    add = parser.add_argument
    add("what", metavar="WHAT", choices=("prompts", "answers", "pairs"), help=about)
    add("--file", metavar="FILE", required=True, help="seeds or prompts, in any format")
    add("--out", type=Path, metavar="F.jsonl", required=True, help="grows; can be continued")
    add("--url", required=True, help="an OpenAI-compatible API, such as http://127.0.0.1:8000/v1")
    add("--model", required=True, metavar="NAME", help="the model's name in the API")
    add_options(parser, SynthesisOptions)
    parser.epilog = "The cost is shown first. Stopped at any time, it continues where it was."


def read_requests(path: str, languages: Sequence[str]) -> list[tuple[str, str, str]]:
    """Place, request for a translation, and reference, of every pair in order.

    Every sentence is needed for a score, so a broken pair stops. `path` is that of a config's
    source, the languages are source and target, such as `de` and `en`.

    Raises:
        ValueError: an unknown language, no such file, or a pair is broken or has an empty side.
    """
    from chatllama.config.sources import DataSource, language_codes
    from data.reading.formats import RecordError, mapping
    from data.reading.source import decode_source
    from data.reading.translation import TEMPLATES, request, sentence_pair

    language_codes(languages)
    source = DataSource(path=path, format="translation", languages=list(languages))
    found: list[tuple[str, str, str]] = []
    for where, raw in decode_source(source):
        if isinstance(raw, RecordError):
            raise raw
        try:
            sentence, reference = sentence_pair(mapping(raw, "the record"), languages)
        except ValueError as error:
            raise RecordError(f"{where}: {error}") from None
        if not sentence or not reference:
            raise RecordError(f"{where}: the {'translation' if sentence else 'sentence'} is empty")
        found.append((where, request(sentence, languages, TEMPLATES[0]), reference))
    if not found:
        raise RecordError(f"{path}: no sentences")
    return found


def read_held_out(cfg: "Config", path: Path | None) -> list[dict[str, Any]]:
    """Messages, untrained turns and place of what SFT holds out, or of a file's conversations.

    Raises:
        ValueError: nothing is held out, or the file is none of SFT's formats.
    """
    import datasets

    from chatllama.config.sources import DataSource
    from data.mixture import load_mixture
    from data.reading.source import read_source

    datasets.disable_progress_bars()
    if path is not None:
        rows, report = read_source(DataSource(path=str(path)), "sft")
        print(report.summary())
    elif not cfg.sft.data:
        raise ValueError("--suite instructions: the run has no sft.data; give --data FILE")
    else:
        sft = cfg.sft
        sources = (sft.data, sft.eval_data, sft.eval_fraction, cfg.seed)
        rows = load_mixture(*sources, "sft", sft.decontaminate).held_out
    if not len(rows):
        raise ValueError(
            f"{path or 'sft.data'}: no held-out conversations; give --data FILE, or sft.eval_data "
            "or sft.eval_fraction in the config"
        )
    names = ("messages", "untrained", "where")
    return [{name: row[name] or [] for name in names} for row in rows.to_list()]
