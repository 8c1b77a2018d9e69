"""How a running stage looks: a live line on a terminal, plain lines in a pipe or a log file.

What is shown comes from `tracking.py`; nothing here writes a file.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

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
RATE_WINDOW = 30
MAIN_METRICS: dict[Stage, tuple[str, ...]] = {
    "sft": ("sft/loss", "sft/lr"),
    "reward": ("reward/loss", "reward/accuracy"),
    "ppo": ("ppo/score_mean", "ppo/kl_sequence", "ppo/response_length", "ppo/entropy"),
}


def open_display(stage: Stage, total_steps: int, title: str) -> "PlainDisplay":
    """A live display on a terminal, else a plain one."""
    kind = LiveDisplay if sys.stdout.isatty() else PlainDisplay
    return kind(stage, total_steps, title)


class PlainDisplay:
    """Progress as lines without any control code, at most one every few seconds."""

    def __init__(self, stage: Stage, total_steps: int, title: str) -> None:
        self._names = MAIN_METRICS[stage]
        self._title = title
        self._total = total_steps
        self._seen: deque[tuple[int, float]] = deque([(0, time.monotonic())], RATE_WINDOW)
        self._values: dict[str, float] = {}
        self._last_line = -math.inf

    def start_at(self, step: int) -> None:
        """Shows `step` as done and counts the rate from there."""
        self._seen = deque([(step, time.monotonic())], RATE_WINDOW)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in a step; draws it when it is time to."""
        if step > self._seen[-1][0]:
            self._seen.append((step, time.monotonic()))
        self._values.update({n: metrics[n] for n in self._names if n in metrics})
        self._draw(step)

    def show_sample(self, step: int, prompt: str, response: str, score: float) -> None:
        """Prints one sampled answer."""
        text = f"[{self._title} {step}] score {score:.2f}\n  > {prompt}\n  < {response}"
        print(printable(text), flush=True)

    def stop(self) -> None:
        """Ends the display."""

    def _draw(self, step: int) -> None:
        now = time.monotonic()
        if step < self._total and now - self._last_line < SECONDS_BETWEEN_LINES:
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
        left = duration((self._total - step) / rate)
        pace = f"{rate:.2f} step/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        return pace if step >= self._total else f"{pace}  {left} left"

    def _numbers(self) -> str:
        pairs = (f"{name.split('/', 1)[1]} {value:.4g}" for name, value in self._values.items())
        return "  ".join(pairs)


class LiveDisplay(PlainDisplay):
    """Progress as one line that is drawn again in place."""

    def __init__(self, stage: Stage, total_steps: int, title: str) -> None:
        super().__init__(stage, total_steps, title)
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[pace]}"),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=Console(highlight=False))
        self._task = self._progress.add_task(escape(title), total=total_steps, pace="", numbers="")
        self._progress.start()

    def start_at(self, step: int) -> None:
        """Shows `step` as done and counts the rate from there."""
        super().start_at(step)
        self._progress.update(self._task, completed=step)

    def show_sample(self, step: int, prompt: str, response: str, score: float) -> None:
        """Prints one sampled answer above the line."""
        console = self._progress.console
        console.print(f"[bold]{self._title} {step}[/]  score [cyan]{score:.2f}[/]")
        console.print(f"  [dim]>[/] {escape(printable(prompt))}")
        console.print(f"  [green]<[/] {escape(printable(response))}")

    def stop(self) -> None:
        """Leaves the line as it is."""
        self._progress.stop()

    def _draw(self, step: int) -> None:
        pace, numbers = self._pace(step), self._numbers()
        self._progress.update(self._task, completed=step, pace=pace, numbers=numbers)


class _Progress:
    """Answers done, on stderr: a bar on a terminal, else a line every few seconds."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._total, self._done, self._shown = total, done, shown
        self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "_Progress":
        if self._shown and sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("answers", total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Takes in `count` more answers."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            tell(f"{self._done}/{self._total} answers")
