"""What the command line does with data: `data check`, `data show`, and the pairs for `eval`."""

from collections.abc import Sequence
from pathlib import Path

import datasets
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from chatllama.config import Config, DataSource, language_codes
from data.cleaning import write_cleaned
from data.doctor import examine
from data.layouts import RecordError, mapping
from data.readers import decode_source
from data.show import page, print_records, shown_records
from data.translation import TEMPLATES, request, sentence_pair

STAGES = ("pretraining", "sft", "reward", "ppo")


def check_command(
    cfg: Config,
    config_file: Path,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    stage: str | None,
    fix: bool,
    out: Path,
) -> int:
    """Exit code, after printing what is wrong with a config's data and writing it to `out`.

    Args:
        cfg: the run's.
        config_file: where it was read from.
        tokenizer: the run's; None where there is none yet.
        stage: the only one to look at. None: all.
        fix: write cleaned copies into `out/cleaned`. The exit code is still that of the originals.
        out: folder for the report and the plot.
    """
    datasets.disable_progress_bars()
    console = Console(soft_wrap=True)
    examination = examine(cfg, tokenizer, STAGES if stage is None else (stage,))
    examination.report.show(console)
    for file in examination.report.write(out):
        console.print(f"written: {file}", markup=False)
    if fix:
        cleaned = write_cleaned(cfg, config_file, examination, out / "cleaned")
        console.print(
            f"kept {cleaned.num_kept} records, dropped {cleaned.num_dropped} ({cleaned.log}); "
            f"train with {cleaned.config}",
            markup=False,
        )
    return examination.report.exit_code


def show_command(
    cfg: Config,
    tokenizer: PreTrainedTokenizerFast,
    stage: str,
    num: int,
    html: Path | None,
) -> None:
    """Prints the first records of a stage's sources as tokens, or writes them as a page.

    Raises:
        ValueError: the stage has no data, or a source cannot be read.
    """
    datasets.disable_progress_bars()
    shown = shown_records(cfg, tokenizer, stage, num)
    if html is None:
        print_records(shown, Console())
        return
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page(shown), encoding="utf-8")
    print(f"written: {html}")


def read_requests(path: str, languages: Sequence[str]) -> list[tuple[str, str, str]]:
    """Place, request for a translation, and reference, of every pair in order.

    Every sentence is needed for a score, so a broken pair stops.

    Args:
        path: a file of pairs, or of two aligned files without their endings, as in a config.
        languages: source and target, such as `de` and `en`.

    Raises:
        ValueError: an unknown language, no such file, or a pair is broken or has an empty side.
    """
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
