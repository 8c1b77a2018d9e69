import math
from pathlib import Path

import pytest

from chatllama.config import TrackingSection
from chatllama.report import write_report
from chatllama.run_folder import RunFolder
from chatllama.tracking import Tracker
from trainers.health import Diagnosis, start_diagnoses, write_diagnoses


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.config.write_text("seed: 0\n")
    with Tracker(run, "ppo", TrackingSection(report_to=[]), 12, 0) as tracker:
        for step in range(1, 13):
            tracker.log(step, {"ppo/entropy": 1.0})
    return run


def diagnosis(name: str, step: int, figure: float) -> Diagnosis:
    fatal = "fatal" if name == "not_finite" else "warning"
    return Diagnosis(name, step, figure, 1.0, "A <b> is bad.", ("this", "that"), "ppo.x", fatal)


def test_a_run_that_nobody_watched_has_no_section(run: RunFolder) -> None:
    assert "<h2>Health</h2>" not in write_report(run).read_text(encoding="utf-8")


def test_a_healthy_run(run: RunFolder) -> None:
    start_diagnoses(run.stage("ppo") / "health.jsonl", 0)
    page = write_report(run).read_text(encoding="utf-8")
    assert "<h2>Health</h2>" in page and "No diagnosis in 12 steps." in page


def test_diagnoses_are_listed_by_name(run: RunFolder) -> None:
    path = run.stage("ppo") / "health.jsonl"
    start_diagnoses(path, 0)
    write_diagnoses(path, [diagnosis("length_drift", 3, 2.5)], "go on")
    write_diagnoses(path, [diagnosis("length_drift", 9, 2.75)], "go on")
    write_diagnoses(path, [diagnosis("not_finite", 11, math.nan)], "rollback")
    page = write_report(run).read_text(encoding="utf-8")
    assert '<li class="neutral"><strong>length_drift</strong> at step 3, 9: 2.75, thre' in page
    assert '<li class="bad"><strong>not_finite</strong> at step 11: not finite. A' in page
    assert "A &lt;b&gt; is bad. Rolled back to a checkpoint.<br>" in page
    assert "Likely causes: this; that. Turn: ppo.x." in page
    assert "No diagnosis" not in page
