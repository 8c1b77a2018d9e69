"""Progress of a running command: a live line on a terminal, plain lines in a pipe or a log file.

What a stage shows comes from `tracker.py`; nothing here writes a file.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from chatllama.runs.folder import Stage
from chatllama.runtime.command_line import duration, printable, tell

SECONDS_BETWEEN_LINES = 5.0
STEPS_BEFORE_ESTIMATE = 3
"""Whose time is measured before the time to the end is said."""
SECONDS_BETWEEN_PHASES = 30.0
RATE_WINDOW = 30
MAIN_METRICS: dict[Stage, tuple[str, ...]] = {
    "sft": ("sft/loss", "sft/lr"),
    "reward": ("reward/loss", "reward/accuracy"),
    "ppo": ("ppo/score_mean", "ppo/kl_sequence", "ppo/response_length", "ppo/entropy"),
}


class PlainDisplay:
    """Progress of a stage as lines on stdout, at most one every few seconds."""

    def __init__(self, stage: Stage, total_steps: int, title: str) -> None:
        self._names, self._total, self._title = MAIN_METRICS[stage], total_steps, title
        self._values: dict[str, float] = {}
        self._last_line = time.monotonic() - SECONDS_BETWEEN_LINES
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Shows `step` as done and measures the rate from there."""
        self._seen: deque[tuple[int, float]] = deque([(step, time.monotonic())], RATE_WINDOW)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the main metrics of a finished step."""
        if step > self._seen[-1][0]:
            self._seen.append((step, time.monotonic()))
        self._values.update({n: metrics[n] for n in self._names if n in metrics})
        self._draw(step)

    def show_phase(self, name: str, done: int, total: int) -> None:
        """Shows how far the running step is: a line where nothing was printed for long."""
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_PHASES:
            return
        self._last_line = now
        print(f"{self._title} {self._seen[-1][0]}/{self._total}  {name} {done}/{total}", flush=True)

    def show_sample(self, step: int, prompt: str, response: str, score: float) -> None:
        """Prints one sampled answer."""
        text = f"[{self._title} {step}] score {score:.2f}\n  > {prompt}\n  < {response}"
        print(printable(text), flush=True)

    def stop(self) -> None:
        """Ends the display."""

    def _draw(self, step: int) -> None:
        now = time.monotonic()
        first = len(self._seen) == STEPS_BEFORE_ESTIMATE + 1  # the first time to the end
        if step < self._total and now - self._last_line < SECONDS_BETWEEN_LINES and not first:
            return
        self._last_line = now
        percent = 100 * step // self._total
        line = f"{self._title} {step}/{self._total} {percent}%  {self._pace(step)}  "
        print(line + self._numbers(), flush=True)

    def _pace(self, step: int) -> str:
        """Rate over the last steps and the time left at that rate."""
        (first, then), (last, now) = self._seen[0], self._seen[-1]
        if last == first or now == then:
            return "- step/s"
        rate = (last - first) / (now - then)
        pace = f"{rate:.2f} step/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        left = duration((self._total - step) / rate)
        known = step < self._total and len(self._seen) > STEPS_BEFORE_ESTIMATE
        return f"{pace}  {left} left" if known else pace

    def _numbers(self) -> str:
        return "  ".join(f"{n.split('/', 1)[1]} {v:.4g}" for n, v in self._values.items())


class LiveDisplay(PlainDisplay):
    """Progress of a stage as one line on a terminal, redrawn in place."""

    def __init__(self, stage: Stage, total_steps: int, title: str) -> None:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[pace]}"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[dim]{task.fields[phase]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(highlight=False))
        self._task = self._progress.add_task(
            escape(title), total=total_steps, pace="", numbers="", phase=""
        )
        super().__init__(stage, total_steps, title)
        self._progress.start()

    def start_at(self, step: int) -> None:
        """Shows `step` as done and measures the rate from there."""
        super().start_at(step)
        self._progress.update(self._task, completed=step)

    def show_phase(self, name: str, done: int, total: int) -> None:
        """Shows how far the running step is."""
        self._progress.update(self._task, phase=f"{name} {done}/{total}")

    def show_sample(self, step: int, prompt: str, response: str, score: float) -> None:
        """Prints one sampled answer above the line."""
        console = self._progress.console
        console.print(f"[bold]{escape(self._title)} {step}[/]  score [cyan]{score:.2f}[/]")
        console.print(f"  [dim]>[/] {escape(printable(prompt))}")
        console.print(f"  [green]<[/] {escape(printable(response))}")

    def stop(self) -> None:
        """Leaves the line as it is."""
        self._progress.stop()

    def _draw(self, step: int) -> None:
        pace, numbers = self._pace(step), self._numbers()
        self._progress.update(self._task, completed=step, pace=pace, numbers=numbers, phase="")


@contextmanager
def answer_progress(total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Counts answers on stderr: a bar on a terminal, else a line every few seconds.

    Yields the function that takes the number of further answers.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("answers", total=total, completed=done)
    is_live, last_line = sys.stderr.isatty(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        bar.update(task, completed=done)
        now = time.monotonic()
        if shown and not is_live and now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            tell(f"{done}/{total} answers")

    with bar if shown and is_live else nullcontext():
        yield advance
