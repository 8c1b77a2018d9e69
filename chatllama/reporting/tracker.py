"""What a running stage reports: metrics.jsonl, samples.jsonl, trackers, progress.

Only rank 0 writes and prints. It computes no metric and decides nothing about training; how
progress looks is in `display.py`.
"""

import math
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from chatllama.config.schema import TrackingSection, WandbSection
from chatllama.reporting.display import LiveDisplay, PlainDisplay
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.command_line import tell
from chatllama.runtime.jsonl import append_lines, keep_lines, read_lines
from chatllama.runtime.waiting import now_doing

TRACKERS = ("tensorboard", "wandb")


def check_trackers(report_to: list[str]) -> None:
    """Raises ValueError if a tracker is unknown or its package is missing."""
    for name in report_to:
        if name not in TRACKERS:
            allowed = ", ".join(TRACKERS)
            raise ValueError(f"tracking.report_to: {name!r} is unknown; allowed: {allowed}")
        if find_spec(name) is None:
            raise ValueError(
                f"tracking.report_to: {name!r} needs the package of that name: "
                f"pip install {name}, or take it out of the list"
            )


class _Writer(Protocol):
    """A tracker beside metrics.jsonl."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in RUN/<stage>/tensorboard."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)
        self.close = self._writer.close

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)


class _Wandb:
    """One Weights & Biases run per stage; a resumed stage goes on in its own."""

    def __init__(self, run: RunFolder, stage: Stage, section: WandbSection, resumed: bool) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        group, folder = section.name or run.root.name, run.stage(stage)
        names = {"project": section.project, "entity": section.entity, "notes": section.notes}
        names |= {"group": group, "name": f"{group}-{stage}", "tags": section.tags}
        path = folder / "wandb-id"
        known = path.read_text(encoding="utf-8") if resumed and path.is_file() else None
        self._run = wandb.init(
            **names, dir=str(folder), mode=section.mode, id=known, resume="allow"
        )
        path.write_text(self._run.id, encoding="utf-8")
        # Steps as a column: after a rollback they repeat, which W&B's own counter cannot.
        self._run.define_metric("*", step_metric="step")
        self.close = self._run.finish

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})


class Tracker:
    """Metrics and progress of one stage; use as `with Tracker(...) as tracker:`.

    Ranks other than 0 do nothing. `total_steps` includes finished steps; `title` is that of the
    display, the stage's name by default.

    Raises:
        ValueError: `tracking.report_to` cannot be honoured (on every rank alike).
    """

    def __init__(
        self,
        run: RunFolder,
        stage: Stage,
        tracking: TrackingSection,
        total_steps: int,
        rank: int,
        title: str | None = None,
    ) -> None:
        check_trackers(tracking.report_to)
        self._run, self._tracking, self._total = run, tracking, total_steps
        self._stage: Stage = stage
        self._title = title or stage
        self._is_main = rank == 0
        self._resumed_step = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._writers: list[_Writer] | None = None
        self._display: PlainDisplay | None = None
        self._named_not_finite: set[str] = set()

    def __enter__(self) -> "Tracker":
        self._started = time.monotonic()
        if self._is_main:
            kind = LiveDisplay if sys.stdout.isatty() else PlainDisplay
            self._display = kind(self._stage, self._total, self._title)
            self._display.start_at(self._resumed_step)
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.stop()
            now_doing(f"{self._title}: measuring and saving")
        self._close_writers()

    def resume_from(self, step: int) -> None:
        """Continues the files of an interrupted stage: lines of later steps are cut away.

        `step` is the last one in the restored state. Call before the first `log`; without it the
        stage's files start anew.
        """
        assert self._writers is None, "resume_from comes before the first log"
        if not self._is_main:
            return
        lines = read_lines(self._run.metrics(self._stage))
        kept = (line["time"] for line in lines if line["step"] <= step)
        self._seconds_before = max(kept, default=0.0)
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Goes back to `step` in mid-run: lines of later steps are cut away, the clock runs on."""
        if not self._is_main:
            return
        self._close_writers()
        self._writers, self._resumed_step = None, step
        if self._display is not None:
            self._display.start_at(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows progress and writes the metrics of a step.

        Every `tracking.log_every`-th step is written, and always the first, the last and every
        call that holds a metric named `.../eval_...`. Values that are not finite become null in
        metrics.jsonl, with a warning the first time.

        Args:
            step: optimizer steps (SFT, reward) or rollout batches (PPO) done, from 1.
            metrics: values by names like `ppo/kl_sequence`.
        """
        if not self._is_main:
            return
        if self._display is not None:
            self._display.update(step, metrics)
        due = step % self._tracking.log_every == 0 or step in (1, self._total)
        if not due and not any("/eval_" in name for name in metrics):
            return
        self._warn_not_finite(step, metrics)
        finite = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
        seconds = self._seconds_before + time.monotonic() - self._started
        line: dict[str, float | int | None] = {"step": step, "time": round(seconds, 3)}
        line.update({name: finite.get(name) for name in metrics})
        writers = self._open()
        path = self._run.metrics(self._stage)
        if step == self._resumed_step:  # a closing evaluation that is made a second time
            keep_lines(path, lambda old: old["step"] != step or old.keys() != line.keys())
        append_lines(path, [line], finite=True)
        for writer in writers:
            writer.write(step, finite)

    def phase(self, name: str, done: int, total: int) -> None:
        """Shows that `done` of `total` parts of the running step's phase are done."""
        if self._display is not None:
            self._display.show_phase(name, done, total)

    def sample(self, step: int, prompt: str, response: str, score: float) -> None:
        """Prints an answer every `tracking.sample_every` steps and adds it to samples.jsonl.

        A step is a rollout batch; `score` is the reward model's.
        """
        every = self._tracking.sample_every
        if not self._is_main or every == 0 or (step % every and step not in (1, self._total)):
            return
        self._open()
        kept = score if math.isfinite(score) else None
        content = {"step": step, "prompt": prompt, "response": response, "score": kept}
        append_lines(self._run.samples(self._stage), [content], finite=True)
        if self._display is not None:
            self._display.show_sample(step, prompt, response, score)

    def _open(self) -> list[_Writer]:
        """The trackers; the first call cuts the files to the resumed step and opens them."""
        if self._writers is None:
            self._run.stage(self._stage).mkdir(parents=True, exist_ok=True)
            for path in (self._run.metrics(self._stage), self._run.samples(self._stage)):
                if path.is_file():
                    keep_lines(path, lambda line: line["step"] <= self._resumed_step)
            self._writers = []
            for name in self._tracking.report_to:
                if name == "tensorboard":
                    folder = self._run.stage(self._stage) / "tensorboard"
                    self._writers.append(_TensorBoard(folder, self._resumed_step))
                else:
                    section, resumed = self._tracking.wandb, self._resumed_step > 0
                    self._writers.append(_Wandb(self._run, self._stage, section, resumed))
        return self._writers

    def _close_writers(self) -> None:
        for writer in self._writers or []:
            writer.close()

    def _warn_not_finite(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in self._named_not_finite:
                self._named_not_finite.add(name)
                tell(f"warning: {name} is {value} at step {step}; metrics.jsonl holds null")


def logged_metrics(run: RunFolder, stage: Stage, step: int) -> dict[str, float]:
    """The metrics of a step in metrics.jsonl, null as NaN; empty if it was not logged."""
    found: dict[str, float] = {}
    for line in read_lines(run.metrics(stage)):
        if line["step"] == step:
            found.update({k: math.nan if v is None else v for k, v in line.items()})
    return {name: value for name, value in found.items() if name not in ("step", "time")}
