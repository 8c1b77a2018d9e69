"""What the data check found: defects, figures of every source, and how they are shown.

The checks are in `check.py`, `records.py` and `tokens.py`; here is how severe each is.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.markup import escape

from chatllama.config.sources import DataSource
from chatllama.runtime.files import write_json
from data.reading.records import Kind

Severity = Literal["error", "warning"]
NUM_EXAMPLES = 5
PERCENTILES = (50, 90, 99, 100)
_ERRORS = {
    "unreadable": "cannot be read",
    "nothing_usable": "no record can serve",
    "mixture": "no mixture",
    "malformed": "malformed record",
    "cannot_be_rendered": "cannot be laid out",
    "trains_nothing": "no token of the record is trained",
    "trains_everything": "every token is trained, the prompt too",
    "label_without_eos": "an answer does not end with the EOS, so that stopping is never learnt",
    "double_bos": "two BOS in a row",
    "prompt_is_no_prefix": "the prompt's tokens do not begin those of prompt and answer",
    "leak": "a question of eval_data",
}
MESSAGES = _ERRORS | {
    "broken_text": "U+FFFD: text was decoded wrongly before",
    "control_characters": "control characters in the text",
    "template_marks": "marks of a chat template in the text",
    "duplicate": "exact duplicate",
    "near_duplicate": "near duplicate",
    "contradiction": "the same two answers are ranked the other way round elsewhere",
    "dropped_character": "a character that the tokenizer drops",
    "split_leak": "held-out and training questions that differ in form alone",
    "leak_between_stages": "a question of another stage's eval_data",
}
"""The usual message of a check, by its name; others say what they found."""
WARNINGS = MESSAGES.keys() - _ERRORS.keys() | {"passed_over", "truncated", "contamination"}
"""Checks that are no errors."""


@dataclass(frozen=True)
class Finding:
    """One kind of defect in one source."""

    severity: Severity
    check: str
    source: str
    """`stage.role: path`."""
    count: int
    message: str
    examples: list[str]
    """`file:line: details` of the first few."""


@dataclass
class StageSource:
    """A source, what a stage reads it for, and its figures once it is checked."""

    stage: str
    role: str
    """Its key in the stage's section: `data`, `eval_data` or `ptx_data`."""
    source: DataSource
    kind: Kind
    max_length: int | None
    """Tokens of a record that the stage takes."""
    format: str = ""
    num_records: int = 0
    num_usable: int = 0
    share: float | None = None
    """Part of the stage's training mixture; None for held-out sources."""
    notes: list[str] = field(default_factory=list)
    """What the verdicts say, keys that are not used, and other facts that are no defects."""
    scripts: dict[str, int] = field(default_factory=dict)
    """Usable records by script."""
    num_tokens: int | None = None
    """Of all usable records; None without a tokenizer."""
    num_trained_tokens: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of a record at some percentiles."""
    truncated: int = 0
    """Records that are cut or left out because they are over max_length."""

    @property
    def name(self) -> str:
        """`stage.role: path`."""
        return f"{self.stage}.{self.role}: {self.source.path}"


class Findings:
    """Collects defects by check, source and message, with a few examples each."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._examples: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)

    def add(self, check: str, source: str, example: str = "", message: str = "") -> None:
        """Counts one defect; without a message, with that of MESSAGES."""
        key = (check, source, message or MESSAGES[check])
        self._counts[key] += 1
        if example and len(self._examples[key]) < NUM_EXAMPLES:
            self._examples[key].append(example)

    def all(self) -> list[Finding]:
        """Errors first, then in the order in which they were found."""
        found = []
        for key, count in self._counts.items():
            check, source, message = key
            severity: Severity = "warning" if check in WARNINGS else "error"
            found.append(Finding(severity, check, source, count, message, self._examples[key]))
        return sorted(found, key=lambda each: each.severity != "error")


@dataclass(frozen=True)
class DataReport:
    """Everything that was found."""

    sources: list[StageSource]
    findings: list[Finding]
    lengths: dict[str, list[int]]
    """Tokens of every usable record, by source."""
    notes: list[str]
    """What could not be checked, and why."""

    @property
    def num_errors(self) -> int:
        """Findings of severity error."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 where there are errors, else 0."""
        return int(self.num_errors > 0)

    def write(self, folder: Path) -> list[Path]:
        """Writes report.json and, where there are tokens, token_lengths.png; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "report.json"]
        content = asdict(self)
        del content["lengths"]
        for source in content["sources"]:
            source["path"] = source.pop("source").path
        write_json(files[0], content)
        if any(self.lengths.values()):
            files.append(folder / "token_lengths.png")
            _plot(self.sources, self.lengths, files[1])
        return files

    def show(self, console: Console) -> None:
        """Prints the figures of every source, then every finding with its examples."""
        for source in self.sources:
            console.print("\n".join(_lines(source)), markup=False, highlight=False)
        for finding in self.findings:
            style = "bold red" if finding.severity == "error" else "yellow"
            console.print(
                f"[{style}]{finding.severity}[/] {escape(finding.source)}: "
                f"{finding.count} x {escape(finding.message)} [dim]({finding.check})[/]"
            )
            for example in finding.examples:
                console.print(f"    {escape(example)}", style="dim")
        for note in self.notes:
            console.print(f"note: {escape(note)}")
        warnings = len(self.findings) - self.num_errors
        console.print(f"{self.num_errors} errors, {warnings} warnings")


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """`{"p50": ..., ...}`, of observed values; empty for no lengths."""
    if not lengths:
        return {}
    values = np.percentile(np.asarray(lengths), PERCENTILES, method="higher")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def _lines(source: StageSource) -> list[str]:
    """The figures of a source, in words."""
    share = "" if source.share is None else f", {source.share:.1%} of the mixture"
    lines = [f"{source.name} ({source.format or 'format unknown'}{share})"]
    total = sum(source.scripts.values()) or 1
    top = sorted(source.scripts.items(), key=lambda item: -item[1])[:4]
    scripts = ", ".join(f"{name} {count / total:.1%}" for name, count in top)
    lines.append(f"  {source.num_usable} of {source.num_records} records usable; {scripts}")
    lines += [f"  {note}" for note in source.notes]
    if source.lengths and source.num_tokens:
        each = source.lengths
        text = f"  tokens of a record: median {each['p50']}, 99 % within {each['p99']}, "
        text += f"longest {each['p100']}"
        if source.max_length:
            over = f"{source.truncated} ({source.truncated / source.num_usable:.1%})"
            text += f"; {over} over the limit of {source.max_length}"
        if source.kind != "prompts":
            text += f"; {source.num_trained_tokens / source.num_tokens:.0%} of all tokens trained"
        lines.append(text)
    return lines


def _plot(sources: Sequence[StageSource], lengths: dict[str, list[int]], file: Path) -> None:
    """A histogram of tokens for each source, with the stage's limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [source for source in sources if lengths.get(source.name)]
    figure = Figure(figsize=(8, 2.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, source in zip(axes, shown, strict=True):
        axis.hist(lengths[source.name], bins=50)
        if source.max_length:
            over = f"limit {source.max_length}: {source.truncated} over"
            axis.axvline(source.max_length, color="tab:red", label=over)
            axis.legend()
        axis.set_title(source.name, fontsize=8, loc="left", parse_math=False)
        axis.set_ylabel("records")
    axes[-1].set_xlabel("tokens of a record")
    figure.savefig(file, dpi=100)
