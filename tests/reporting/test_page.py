import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from chatllama.config.schema import RewardSection, TrackingSection
from chatllama.reporting.page import write_report
from chatllama.reporting.plots import PANELS, curve, draw, smooth
from chatllama.reporting.reward_section import diagnosis_section, reward_terms
from chatllama.reporting.summary import (
    config_of,
    findings,
    read_summary,
    result_table,
    reward_accuracy,
    write_summary,
)
from chatllama.reporting.tracker import Tracker
from chatllama.reporting.verdict import no_gold
from chatllama.runs.folder import RunFolder, write_record
from chatllama.runtime.files import write_json
from chatllama.runtime.jsonl import read_lines
from trainers.ppo.health.monitor import Diagnosis, start_diagnoses, write_diagnoses
from trainers.reward.data import Preferences
from trainers.reward.diagnosis.data_report import examine_data
from trainers.reward.diagnosis.model_report import diagnosis, examine_model
from trainers.reward.evaluate import PaddingError

VOID = {"meta", "br"}
SUMMARY: dict[str, Any] = {
    "base": {"gold_mean": 0.2, "gold_se": 0.05},
    "sft": {"gold_mean": 0.7, "gold_se": 0.03, "score_mean": -0.1, "response_length": 24.0},
    "ppo": {
        "gold_mean": 2.2,
        "gold_se": 0.04,
        "score_mean": 1.7,
        "win_rate": 0.85,
        "win_rate_low": 0.8,
        "win_rate_high": 0.89,
        "kl": 1.75,
    },
    "reward": {
        "accuracy": 0.849,
        "accuracy_low": 0.826,
        "accuracy_high": 0.869,
        "bayes_accuracy": 0.87,
    },
    "wall_seconds": {"sft": 41.2, "total": 125.0},
}


class Page(HTMLParser):
    """Checks that tags nest and collects ids, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def full_run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "my<run>")
    run.root.mkdir()
    run.config.write_text("seed: 0 # <script>config</script>\n")
    tracking = TrackingSection(report_to=[])
    with Tracker(run, "ppo", tracking, 40, 0) as tracker:
        for step in range(1, 41):
            names = [m for p in PANELS["ppo"] for m in p.curves.values()]
            tracker.log(step, dict.fromkeys(names, step / 10))
        tracker.sample(40, "<script>prompt</script>", "<script>answer</script>", 1.0)
    for stage in ("sft", "reward"):
        with Tracker(run, stage, tracking, 1, 0) as tracker:
            tracker.log(1, {f"{stage}/loss": 0.5, f"{stage}/accuracy": 0.7})
        write_json(run.result(stage), {"loss": 0.5})
    write_json(run.summary, SUMMARY)
    made = {"begun": "2026-01-02T03:04:05+00:00", "finished": None, "code": {"version": "0.9"}}
    made |= {"packages": {"torch": "2.13"}, "config": {}, "base": {"path": "b", "fingerprint": "f"}}
    made |= {"data": {"pairs<1>.jsonl": {"sha256": "0123456789abcdef", "bytes": 1234567}}}
    write_record(run, "reward", made | {"parents": {}})
    sample = {"prompt": "<script>p</script>", "base": "", "sft": "<script>s</script>", "ppo": "z"}
    gold = {"gold": {"base": -1.0, "sft": 0.25, "ppo": 3.1}}
    write_json(run.evaluation, {"roles": {}, "samples": [sample | gold] * 6})
    return run


def test_the_page_is_one_well_formed_file_without_network(full_run: RunFolder) -> None:
    text = write_report(full_run).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|@import|<link|<script|src=", text)
    assert len(page.ids) == len(set(page.ids)) > 100
    assert page.tags.count("svg") == 14 == text.count('role="img" aria-label="') - 2
    assert "#010203" not in text and "var(--curve1)" in text  # colours follow the page


def test_the_page_shows_what_was_measured(full_run: RunFolder) -> None:
    text = Page(write_report(full_run).read_text(encoding="utf-8")).text
    for expected in (
        "my<run>",
        "<script>config</script>",
        "<script>s</script>",
        "<script>answer</script>",
        "0.70 ± 0.03",
        "2.20 ± 0.04",
        "0.850 (0.800–0.890)",  # noqa: RUF001
        "PPO raised the gold score from 0.70 to 2.20 (30.0 standard errors).",
        "95 % Wilson interval 0.826 to 0.869, Bayes limit 0.870",
        "gold score 3.10",
        "(empty)",
        "2 min 05 s",
        "3 more",
        "pairs<1>.jsonl1,234,5670123456789ab",
        "torch2.13",
        "begun2026-01-02 03:04",
        "Hardware: unknown: an older version did not record it.",
    ):
        assert expected in text, expected
    assert "is missing" not in text and "Not logged" not in text


def test_missing_parts_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text("seed: 0\n")
    with Tracker(run, "ppo", TrackingSection(report_to=[]), 9, 0) as tracker:
        tracker.log(1, {"ppo/entropy": 1.0})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "No stage has finished yet." in text
    assert "summary.json holds no results" in text
    assert "evaluation.json is missing" in text
    assert "sft/metrics.jsonl has no lines yet" in text
    assert "Not logged: reward score (normalised), clipped ratios, value loss" in text


def test_only_run_folders_get_a_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder: "):
        write_report(RunFolder(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"holds no config\.yaml and no metrics"):
        write_report(RunFolder(tmp_path))


GRPO = """
run_dir: r
backbone: {path: b}
ppo:
  data: [{path: p.jsonl}]
  advantage: grpo
  samples_per_prompt: 8
  score_normalization: none
  rewards: [{function: "m:brief", weight: 0.5}]
"""


def test_a_run_on_a_function_has_no_reward_model_and_no_critic(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(GRPO)
    ppo = {k: v for k, v in SUMMARY["ppo"].items() if not k.startswith("gold")}
    write_json(run.summary, {"sft": {"score_mean": -0.1}, "ppo": ppo})
    scores = {"score": {"sft": -0.5, "ppo": 1.5}}
    write_json(run.evaluation, {"samples": [{"prompt": "p", "sft": "a", "ppo": "b"} | scores]})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "Gold score" not in text
    assert "Judged by the reward function brief." in text
    assert "reward score (raw) 1.50" in text
    assert "By the reward's own judgement GRPO's answers beat those of SFT" in text
    assert "climbs the reward function brief, which" in text and "thought of asking for" in text
    assert "reward model" not in text.lower().partition("configuration")[0]
    with Tracker(run, "ppo", TrackingSection(report_to=[]), 9, 0) as tracker:
        tracker.log(1, {"ppo/entropy": 1.0})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "During GRPO" in text and "GRPO curves" in text and "PPO" not in text
    assert "Not logged: reward score (less penalties), clipped ratios." in text


def test_each_term_of_the_reward_has_its_curve_and_row(tmp_path: Path) -> None:
    run, terms = (
        RunFolder(tmp_path),
        "rewards: [{function: 'm:brief'}, {adapter: run, weight: 2.0}]",
    )
    run.config.write_text(f"run_dir: r\nbackbone: {{path: b}}\nppo: {{{terms}}}\n")
    with Tracker(run, "ppo", TrackingSection(report_to=[]), 9, 0) as tracker:
        for step in (1, 2):
            metrics = {"brief": -0.5 / step, "reward_model": 3.0}
            means = {f"ppo/term_mean/{name}": value for name, value in metrics.items()}
            shares = {f"ppo/term_share/{name}": 0.25 * step for name in metrics}
            tracker.log(step, means | shares)
    assert reward_terms(config_of(run), read_lines(run.metrics("ppo"))) == [
        ["brief", "function: m:brief", "1", "-0.5", "-0.25", "50%"],
        ["reward_model", "reward adapter: run", "2", "3", "3", "50%"],
    ]
    text = write_report(run).read_text(encoding="utf-8")
    assert "Reward terms: brief from -0.5 at step 1 to -0.25 at step 2" in text
    assert "Share of each reward term: brief from 0.25 at step 1 to 0.5 at step 2" in text
    assert "the reward (brief, reward_model)" in no_gold(read_summary(run))


def test_table_leaves_out_what_nobody_has() -> None:
    assert result_table({}) == ([], [])
    heads, rows = result_table({"ppo": {"kl": 1.5}, "sft": {"gold_mean": 1.0}})
    assert heads == ["model", "gold score", "KL to SFT (nats)"]
    assert rows == [["base", "–", "–"], ["SFT", "1.00", "–"], ["PPO", "–", "1.50"]]  # noqa: RUF001


@pytest.mark.parametrize(
    ("sft", "ppo", "kind", "words"),
    [
        ((1.0, 0.3), (3.0, 0.4), "good", "raised the gold score from 1.00 to 3.00 (4.0 standard"),
        ((1.0, 0.3), (1.5, 0.4), "neutral", "no measurable difference"),
        ((1.0, 0.3), (-1.0, 0.4), "bad", "from -0.50 to 2.50: it is over-optimised"),
        ((1.0, 0.0), (1.0, 0.0), "neutral", "errors unknown"),
        ((0.7, 1e-8), (0.7000001, 0.0), "neutral", "errors unknown"),  # rounding
        ((-3e4, 1e-3), (-29999.0, 1e-3), "neutral", "errors unknown"),
    ],
)
def test_finding_about_gold(
    sft: tuple[float, float], ppo: tuple[float, float], kind: str, words: str
) -> None:
    (found,) = findings(
        {
            "sft": {"gold_mean": sft[0], "gold_se": sft[1], "score_mean": -0.5},
            "ppo": {"gold_mean": ppo[0], "gold_se": ppo[1], "score_mean": 2.5},
        }
    )
    assert found.kind == kind and words in found.text


def test_a_poor_reward_model_is_named() -> None:
    (far,) = findings({"reward": {"accuracy": 0.70, "bayes_accuracy": 0.87}})
    assert far.kind == "bad" and "0.700 is far below the 0.870" in far.text
    assert findings({"reward": {"accuracy": 0.83, "bayes_accuracy": 0.87}}) == []
    (guess,) = findings({"reward": {"accuracy": 0.55, "accuracy_low": 0.49}})
    assert "cannot be distinguished from guessing" in guess.text
    assert reward_accuracy(SUMMARY) == "0.849 (0.826–0.869), Bayes limit 0.870"  # noqa: RUF001


def test_summary_gathers_the_stages(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_json(run.result("sft"), {"wall_seconds": 100.0, "backbone_seconds": 70.0})
    write_json(run.result("reward"), {"wall_seconds": 20.0, "accuracy": 0.8, "loss": 0.4})
    write_json(run.result("ppo"), {"wall_seconds": 50.0, "evaluation_seconds": 5.0})
    write_json(run.evaluation, {"roles": {"ppo": {"kl": 1.5}}, "samples": []})
    write_summary(run)
    assert read_summary(run) == {
        "ppo": {"kl": 1.5},
        "reward": {"accuracy": 0.8},
        "wall_seconds": {
            "backbone": 70.0,
            "sft": 30.0,
            "reward": 20.0,
            "ppo": 50.0,
            "evaluation": 5.0,
            "total": 175.0,
        },
    }


def test_curves_leave_gaps_out() -> None:
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2.0}]
    assert curve(lines, "a") == ([1.0, 4.0], [1.0, 2.0])
    assert smooth([0.0, 3.0, 6.0, 0.0], 3) == [0.0, 3.0, 3.0, 3.0]  # begins where the curve begins
    assert draw(PANELS["ppo"][0], lines) is None


def test_a_plot_says_in_words_what_it_shows() -> None:
    lines = [{"step": s, "ppo/kl_sequence": v} for s, v in ((1, 0.5), (2, 3.0), (3, 2.0))]
    svg = draw(PANELS["ppo"][1], lines)
    assert svg is not None
    words = "KL to the reference: training from 0.5 at step 1 to 2 at step 3, lowest 0.5, highest 3"
    assert words in svg


# --- health


@pytest.fixture
def ppo_run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.config.write_text("seed: 0\n")
    with Tracker(run, "ppo", TrackingSection(report_to=[]), 12, 0) as tracker:
        for step in range(1, 13):
            tracker.log(step, {"ppo/entropy": 1.0})
    return run


def health(name: str, step: int, figure: float) -> Diagnosis:
    fatal = "fatal" if name == "not_finite" else "warning"
    return Diagnosis(name, step, figure, 1.0, "A <b> is bad.", ("this", "that"), "ppo.x", fatal)


def test_a_run_that_nobody_watched_has_no_section(ppo_run: RunFolder) -> None:
    assert "<h2>Warnings</h2>" not in write_report(ppo_run).read_text(encoding="utf-8")


def test_a_healthy_run(ppo_run: RunFolder) -> None:
    start_diagnoses(ppo_run.stage("ppo") / "health.jsonl", 0)
    page = write_report(ppo_run).read_text(encoding="utf-8")
    assert "<h2>Warnings</h2>" in page and "No diagnosis in 12 steps of PPO." in page


def test_diagnoses_are_listed_by_name(ppo_run: RunFolder) -> None:
    path = ppo_run.stage("ppo") / "health.jsonl"
    start_diagnoses(path, 0)
    write_diagnoses(path, [health("length_drift", 3, 2.5)], "go on")
    write_diagnoses(path, [health("length_drift", 9, 2.75)], "go on")
    write_diagnoses(path, [health("not_finite", 11, math.nan)], "rollback")
    page = write_report(ppo_run).read_text(encoding="utf-8")
    assert "<strong>length_drift</strong> at step 3, 9: 2.75, threshold 1. A" in page
    assert (
        '<li class="bad"><span class="tag">fatal</span> <strong>not_finite</strong> at step 11:'
        in page
    )
    assert page.index("not_finite") < page.index("length_drift")  # the gravest first
    assert "A &lt;b&gt; is bad. Rolled back to a checkpoint.<br>" in page
    assert page.count("Likely causes: this; that.") == 2 == page.count("key to change: ppo.x.")
    assert "No diagnosis" not in page


# --- the reward model diagnosis


def examples(count: int) -> Dataset:
    rng = np.random.default_rng(count)
    return Dataset.from_list(
        [
            {
                "answer_ids": [[1, n, *rng.integers(5, 90, rng.integers(2, 9)).tolist(), 2]] * 2,
                "ranks": [0, 1],
                "ratings": [0.0, 0.0],
                "prompt_length": 2,
                "where": f"<script>f:{n}",
            }
            for n in range(count)
        ]
    )


def test_the_section_shows_figures_warnings_and_plots(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    assert diagnosis_section(run) is None
    data = Preferences(examples(60), examples(50), {"too <long>": 3})
    found = examine_data(data)
    write_json(run.reward_diagnosis, diagnosis(found))
    section = diagnosis_section(run)
    assert section is not None and section["plots"] == []
    assert "accuracy of words alone" in dict(section["groups"]["What needs no reward model"])

    scores = [x for n in range(50) for x in ((1.0, 0.0) if n % 10 else (0.0, 1.0))]
    model = examine_model(
        data.held_out, [scores, scores], RewardSection(), 0.95, PaddingError(1e-6, 1e-3)
    )
    write_json(run.reward_diagnosis, diagnosis(found, model))
    run.config.write_text("seed: 0\n")
    page = write_report(run).read_text(encoding="utf-8")
    section = page.split("<h2>Warnings</h2>")[1].split("PPO curves")[0]
    assert section.count("<svg") == 3 and "#010203" not in section
    for expected in (
        "0.900 (0.786–0.957)",  # noqa: RUF001  45 of 50, by Wilson's formula
        "<strong>few_held_out</strong> of the reward model: 50 held-out prompts",
        "Config key to change: reward.eval_fraction (higher), reward.eval_data.",
        "Bayes limit</th><td>0.950",
        "says 0.73, is 0.90",
        "0.900, 0.900",
        "shortened</th><td>3<",
    ):
        assert expected in section, expected
    assert "<script>" not in page
    assert re.search(r"<h2>Reward model</h2>", page)
