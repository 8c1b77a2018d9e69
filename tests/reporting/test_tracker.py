import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatllama.config.schema import TrackingSection
from chatllama.reporting import display
from chatllama.reporting import tracker as tracking
from chatllama.reporting.display import LiveDisplay
from chatllama.reporting.tracker import Tracker
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.command_line import duration, printable
from chatllama.runtime.jsonl import read_lines

QUIET = TrackingSection(report_to=[], sample_every=2)


def test_lines_hold_step_time_and_metrics(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with Tracker(run, "sft", QUIET, 2, 0) as tracker:
        tracker.log(1, {"sft/loss": 2.5})
        on_disk = run.metrics("sft").read_text()
        tracker.log(2, {"sft/loss": 1.5})
    assert on_disk.count("\n") == 1  # flushed line by line
    first, second = read_lines(run.metrics("sft"))
    assert (first["step"], first["sft/loss"]) == (1, 2.5)
    assert (second["step"], second["sft/loss"]) == (2, 1.5)
    assert 0 <= first["time"] <= second["time"] < 60
    assert not run.samples("sft").exists()  # no empty files


def test_log_every_keeps_first_last_and_evaluations(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with Tracker(run, "sft", QUIET.model_copy(update={"log_every": 3}), 7, 0) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"sft/loss": 1.0})
        tracker.log(5, {"sft/eval_loss": 1.0})
    assert [line["step"] for line in read_lines(run.metrics("sft"))] == [1, 3, 6, 7, 5]


def test_not_finite_becomes_null_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    with Tracker(run, "ppo", QUIET, 9, 0) as tracker:
        tracker.log(1, {"ppo/kl_sequence": float("nan"), "ppo/entropy": 1.0})
        tracker.log(2, {"ppo/kl_sequence": float("inf")})
    told = capsys.readouterr().err
    assert told == "warning: ppo/kl_sequence is nan at step 1; metrics.jsonl holds null\n"
    text = run.metrics("ppo").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [line["ppo/kl_sequence"] for line in read_lines(run.metrics("ppo"))] == [None, None]


def test_resume_cuts_later_steps_and_continues_the_clock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.stage("ppo").mkdir()
    old = [{"step": s, "time": 100.0 * s, "ppo/entropy": 1.0} for s in (1, 2, 3)]
    torn = '{"step": 4, "ti'  # the process was killed here
    run.metrics("ppo").write_text("".join(json.dumps(x) + "\n" for x in old) + torn)
    run.samples("ppo").write_text('{"step": 2}\n{"step": 3}\n')
    with Tracker(run, "ppo", QUIET, 9, 0) as tracker:
        tracker.resume_from(2)
        tracker.log(3, {"ppo/entropy": 7.0})
    lines = read_lines(run.metrics("ppo"))
    assert [(x["step"], x["ppo/entropy"]) for x in lines] == [(1, 1.0), (2, 1.0), (3, 7.0)]
    assert 200 <= lines[2]["time"] < 260
    assert read_lines(run.samples("ppo")) == [{"step": 2}]


@pytest.mark.parametrize("torn", ["", '{"step": 4, "ti'])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_closing_evaluation_is_not_told_twice(tmp_path: Path, stage: Stage, torn: str) -> None:
    """Nor thrice, where the process was killed behind it, or in the middle of its line."""
    run = RunFolder(tmp_path)
    for start, loss in ((None, 3.0), (4, 5.0), (4, 7.0)):
        with Tracker(run, stage, QUIET, 4, 0) as tracker:
            if start is None:
                tracker.log(3, {f"{stage}/loss": 1.0, f"{stage}/eval_loss": 6.0})
                tracker.log(4, {f"{stage}/loss": 2.0})
            else:
                tracker.resume_from(start)
            tracker.log(4, {f"{stage}/eval_loss": loss})
        with run.metrics(stage).open("a") as file:
            file.write(torn)
    lines = [{k: v for k, v in x.items() if k != "time"} for x in read_lines(run.metrics(stage))]
    assert lines == [
        {"step": 3, f"{stage}/loss": 1.0, f"{stage}/eval_loss": 6.0},
        {"step": 4, f"{stage}/loss": 2.0},
        {"step": 4, f"{stage}/eval_loss": 7.0},
    ]


def test_a_fresh_start_does_not_append_to_an_old_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for _ in range(2):
        with Tracker(run, "sft", QUIET, 5, 0) as tracker:
            tracker.log(1, {"sft/loss": 1.0})
    assert len(read_lines(run.metrics("sft"))) == 1


def test_other_ranks_write_and_print_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(RunFolder(tmp_path), "sft", QUIET, 1, 1) as tracker:
        tracker.resume_from(0)
        tracker.log(1, {"sft/loss": 1.0})
        tracker.sample(1, "a", "b", 0.0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_pipe_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(RunFolder(tmp_path), "reward", QUIET, 3, 0) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"reward/loss": 0.5, "reward/accuracy": 0.75, "reward/lr": 1e-4})
        tracker.sample(2, "Hi", "evil \x1b[2J title", 1.25)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("reward 1/3 33%")
    assert not lines[1].startswith("reward 2/3")  # at most one line every few seconds
    assert lines[1].startswith("reward 3/3 100%")
    assert "loss 0.5  accuracy 0.75" in lines[1] and "lr" not in lines[1]
    assert "score 1.25" in out and "\x1b" not in out and "[2J title" in out


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Tracker(RunFolder(tmp_path), "ppo", QUIET, 4, 0, title="my [stage]") as tracker:
        assert isinstance(tracker._display, LiveDisplay)
        tracker.log(4, {"ppo/score_mean": 0.5})
        tracker.sample(4, "[bold]x", "y \x1b[31m", 1.0)
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "4/4" in shown and "score_mean 0.5" in shown
    assert "my [stage]" in shown and "[bold]x" in shown  # model text is no markup
    assert "y \ufffd[31m" in shown


def test_samples_are_kept_at_their_rhythm(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with Tracker(run, "ppo", QUIET, 5, 0) as tracker:
        for step in range(1, 6):
            tracker.sample(step, "p", f"r{step}", float("nan") if step == 4 else 0.5)
    kept = read_lines(run.samples("ppo"))
    assert [(x["step"], x["score"]) for x in kept] == [(1, 0.5), (2, 0.5), (4, None), (5, 0.5)]
    none = QUIET.model_copy(update={"sample_every": 0})
    with Tracker(run, "ppo", none, 5, 0) as tracker:
        tracker.sample(1, "p", "r", 0.5)
    assert len(read_lines(run.samples("ppo"))) == 4


def test_unknown_or_missing_trackers_are_refused_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'tensorbord' is unknown; allowed: tensorboard, wandb"):
        Tracker(RunFolder(tmp_path), "sft", TrackingSection(report_to=["tensorbord"]), 1, 1)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Tracker(RunFolder(tmp_path), "sft", TrackingSection(report_to=["wandb"]), 1, 0)


def test_a_resumed_stage_goes_on_in_its_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(
            id=options["id"] or f"id-{len(begun)}",
            define_metric=lambda name, step_metric: None,
            log=logged.append,
            finish=lambda: None,
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    keys = {"project": "p", "entity": "team", "tags": ["a"], "mode": "offline"}
    section = TrackingSection.model_validate({"report_to": ["wandb"], "wandb": keys})
    run = RunFolder(tmp_path / "mine")
    for resumed_step in (0, 1, 0):
        with Tracker(run, "sft", section, 2, 0) as tracker:
            tracker.resume_from(resumed_step)
            tracker.log(resumed_step + 1, {"sft/loss": 2.0})
    assert [options["id"] for options in begun] == [None, "id-1", None]
    for options in begun:
        assert options.items() >= keys.items()
        assert (options["group"], options["name"]) == ("mine", "mine-sft")
    assert logged[1] == {"step": 2, "sft/loss": 2.0}


def test_tensorboard_gets_finite_values(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with Tracker(run, "sft", TrackingSection(), 2, 0) as tracker:
        tracker.log(1, {"sft/loss": 2.5})
        tracker.log(2, {"sft/loss": 1.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.stage("sft") / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 2.5), (2, 1.5)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not JSON"):
        read_lines(path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.6, "9 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (11_220, "3 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_printable_keeps_lines_and_emoji() -> None:
    assert printable("a\tb\nc 👩\u200d🚀") == "a\tb\nc 👩\u200d🚀"
    assert printable("\x1b\x9b\r\x07") == "\ufffd" * 4


def test_phases_of_a_long_step_are_lines_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Tracker(RunFolder(tmp_path), "ppo", QUIET, 9, 0) as tracker:
        for seconds, done in ((24.0, 1), (2.0, 2), (29.0, 3), (2.0, 4)):
            now[0] += seconds
            tracker.phase("sampling", done, 128)
        tracker.log(1, {"ppo/entropy": 1.0})
        now[0] += 29.0
        tracker.phase("update", 0, 4)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "ppo 0/9  sampling 2/128",
        "ppo 0/9  sampling 4/128",
    ]
    with Tracker(RunFolder(tmp_path), "ppo", QUIET, 9, rank=1) as tracker:
        now[0] += 99.0
        tracker.phase("update", 1, 4)
    assert "update" not in capsys.readouterr().out


def test_the_time_to_the_end_is_told_from_the_third_step_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown = display.PlainDisplay("sft", 10, "sft")
    for step in range(1, 11):
        now[0] += 2.0
        shown.update(step, {})
    lines = capsys.readouterr().out.splitlines()
    told = {line.split("/")[0]: line for line in lines}
    assert "left" not in told["sft 1"] and "14 s left" in told["sft 3"]  # 7 steps of 2 s
    assert "left" not in told["sft 10"] and not any("sft 2/" in line for line in lines)


def test_phases_on_a_terminal_stand_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    shown = LiveDisplay("ppo", 3, "ppo")
    shown.show_phase("scoring", 2, 8)
    (task,) = shown._progress.tasks
    assert task.fields["phase"] == "scoring 2/8"
    shown.update(1, {})
    assert task.fields["phase"] == ""
    shown.stop()
