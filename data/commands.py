"""What `chatllama data check` and `chatllama data show` do with a config that has been loaded."""

from pathlib import Path

import datasets
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from chatllama.config import Config
from data.cleaning import write_cleaned
from data.doctor import examine
from data.show import page, print_records, shown_records

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
