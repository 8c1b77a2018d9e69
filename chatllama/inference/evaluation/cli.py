"""The arguments of `chatllama eval`. Imports nothing heavy."""

import argparse
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from chatllama.inference.options import NEW_TOKENS, GenerationRole, WeightsOptions
from chatllama.runtime.declared_options import add_options, at_least, option


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(WeightsOptions):
    """What `--suite` takes."""

    suite: str | None = option(
        None,
        "benchmark by lm-eval (extra: eval): mmlu, commonsense, hellaswag, ifeval, or names of its "
        "tasks, separated by commas; instructions: answers beside references; overoptimisation: "
        "gold and proxy over the KL; reward: a reward model on pairs",
        metavar="NAME",
    )
    role: GenerationRole | None = option(
        None, "who is measured (default: base, sft and policy; of translations the newest)"
    )
    shots: int | None = option(
        None, "examples before each question (default: the suite's)", limit=at_least(0)
    )
    limit: int | None = option(
        None, "the first N items of each task, or sentences, only", limit=at_least(1)
    )
    data: Path | None = option(
        None,
        "folder of the tasks' records (default: from the hub); instructions: a file in any format "
        "of SFT (default: what the run's SFT held out); reward: files of pairs, or a pattern",
        metavar="PATH",
    )
    batch_size: int | None = option(None, "rows at a time", limit=at_least(1))
    max_new_tokens: int | None = option(
        None, "longest answer (default: the config's)", limit=NEW_TOKENS
    )
    n: int | None = option(
        None, "overoptimisation: samples of a prompt (default: 64)", limit=at_least(2)
    )
    gold: str | None = option(
        None,
        "overoptimisation: who judges, module:function, or a run or adapter with a reward model "
        "(default: evaluation.gold, else the worst member of the run's reward ensemble)",
        metavar="JUDGE",
    )
    beside: tuple[str, ...] = option(
        (), "reward: another reward model on the same pairs; may be repeated", metavar="PLACE"
    )


TAKEN = {
    "overoptimisation": ("limit", "batch_size", "n", "gold"),
    "instructions": ("role", "limit", "batch_size", "data", "max_new_tokens"),
    "reward": ("limit", "batch_size", "data", "beside"),
    "translation": ("role", "limit", "batch_size", "max_new_tokens"),
}
"""Options that are followed where lm-eval does not measure."""
OF_BENCHMARKS = ("role", "shots", "limit", "data", "batch_size")


def check_suite(options: SuiteOptions) -> None:
    """Raises ValueError for an option that the suite, or a translation, does not follow."""
    kind = options.suite or "translation"
    taken = TAKEN.get(kind, OF_BENCHMARKS)
    for name in {*OF_BENCHMARKS, *chain(*TAKEN.values())} - set(taken):
        if vars(options)[name] not in (None, ()):
            raise ValueError(f"--{name.replace('_', '-')} is not for {kind}")
    if kind != "reward" and options.data is not None and not options.data.exists():
        raise ValueError(f"--data {options.data}: there is no such file or folder")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run folder, model, hub id or adapter")
    add_options(parser, SuiteOptions)
    about = (
        "translate pairs in any format, or two aligned files without their endings (news for "
        "news.de and news.en), and score with sacrebleu"
    )
    add("--translation", metavar="FILE", help=about)
    about = "language codes of the translation, such as de en"
    add("--languages", nargs=2, metavar=("FROM", "TO"), help=about)
    parser.epilog = (
        "Results go to RUN/benchmarks or RUN/translation; what was interrupted is continued."
    )
