import re
from pathlib import Path
from typing import Any

import pytest

from chatllama.config.loader import load_config
from chatllama.config.schema import Config
from chatllama.reporting.page import _terms, _warnings, write_report
from chatllama.reporting.reward_section import KEYS
from chatllama.reporting.summary import judged_means
from chatllama.reporting.verdict import Verdict, verdict
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runs.outcome import record_failure, stage_state
from chatllama.runtime.files import write_json
from chatllama.runtime.jsonl import append_lines

ALL: tuple[Stage, ...] = ("sft", "reward", "ppo")
WEAK = {"accuracy": 0.52, "accuracy_low": 0.47, "accuracy_high": 0.57}


def made(
    folder: Path, done: dict[Stage, dict[str, Any]], **reward: Any
) -> tuple[RunFolder, Config]:
    """A run whose stages `done` have these results."""
    run = RunFolder(folder)
    data = {"data": [{"path": "a.jsonl"}]}
    content = {"run_dir": str(folder), "backbone": {"path": "b"}, "reward": {**data, **reward}}
    write_json(run.config, content | {"sft": data, "ppo": data})
    for stage, result in done.items():
        write_json(run.result(stage), result)
    return run, load_config(run.config)


def of(run: RunFolder, cfg: Config | None, summary: dict[str, Any], **health: Any) -> Verdict:
    return verdict(run, cfg, ALL, summary, health or None)


def test_a_refused_run_is_red_and_says_what_to_change(tmp_path: Path) -> None:
    run, cfg = made(tmp_path, {"sft": {}, "reward": WEAK})
    found = of(run, cfg, {})
    assert found.kind == "bad" and found.status.startswith("Refused: PPO does not start")
    assert "0.520 (95 % Wilson interval 0.470 to 0.570)" in found.status
    assert "reward.data" in found.steps[0] and "config.yaml --from reward`" in found.steps[0]
    page = write_report(run).read_text(encoding="utf-8")
    assert '<p class="status bad">Refused' in page


@pytest.mark.parametrize(
    ("result", "reward"),
    [(WEAK, {"allow_weak": True}), (WEAK | {"accuracy_low": 0.51}, {}), (WEAK, None)],
)
def test_what_is_not_refused_goes_on(
    tmp_path: Path, result: dict[str, float], reward: dict[str, Any] | None
) -> None:
    run, cfg = made(tmp_path, {"sft": {}, "reward": result}, **(reward or {}))
    known = None if reward is None else cfg  # a config of another version cannot be read
    found = of(run, known, {})
    assert found.kind == "neutral" and "sft, reward of sft, reward, ppo is done" in found.status
    assert found.steps == [f"`chatllama run {run.config}` goes on with ppo."]
    (run.checkpoints("ppo") / "step-4").mkdir(parents=True)
    write_json(run.interrupted("ppo"), {"step": 4, "signal": "SIGTERM"})
    found = of(run, known, {})
    assert "--resume` goes on with ppo" in found.steps[0]
    assert found.status.endswith("Stage ppo is saved at step 4 (SIGTERM).")


@pytest.mark.parametrize(
    ("steps", "saved", "code", "kind", "status", "step"),
    [
        (0, 0, 2, "refused", "Refused: stage sft: no <file>", "section.key=value`"),
        (7, 4, 2, "refused", "Stopped: stage sft after step 7: no <file>", "value --resume`"),
        (7, 4, 2, "stopped", "Stopped: stage sft at step 7: loss is nan", "value --resume`"),
        (7, 0, 1, "failed", "Failed: stage sft ended after step 7: no <file>", "` tries again"),
        (7, 4, 0, "killed", "ended after step 7 and left no message; the newest", "--resume` goes"),
        (7, 0, 0, "killed", "there is no checkpoint", "goes on with it, from its start"),
    ],
)
def test_a_stage_without_a_result_says_why_and_what_to_do(
    tmp_path: Path, steps: int, saved: int, code: int, kind: str, status: str, step: str
) -> None:
    run, cfg = made(tmp_path, {})
    run.stage("sft").mkdir()
    if steps:
        append_lines(run.metrics("sft"), [{"step": steps}])
    if saved:
        (run.checkpoints("sft") / f"step-{saved}").mkdir(parents=True)
    if code:
        reason = "stopped at step 7: loss is nan" if kind == "stopped" else "no <file>"
        record_failure(run, "sft", reason, code)
    assert str(stage_state(run, "sft")).count("stopped") == (code == 2 and steps > 0)
    assert stage_state(run, "sft").kind == kind.replace("stopped", "refused")
    found = of(run, cfg, {})
    assert found.kind == "bad" and status in found.status and step in found.steps[0]
    record_failure(run, "sft", "a rank is gone", 1)  # what was said first is kept
    assert ("is gone" in stage_state(run, "sft").reason) == (not code)
    owner = {"host": "elsewhere", "pid": 1, "started": 0.0, "command": "c", "since": 0.0}
    write_json(run.root / ".lock-run", owner | {"token": "t"})
    found = of(run, cfg, {})
    assert found.kind == "neutral" and found.status.startswith("Running: stage sft of sft, reward,")


def test_a_run_that_health_stopped(tmp_path: Path) -> None:
    run, cfg = made(tmp_path, {"sft": {}, "reward": WEAK | {"accuracy_low": 0.6}})
    line = {"name": "not_finite", "step": 7, "message": "No number.", "knob": "ppo.x (lower)"}
    assert of(run, cfg, {}, not_finite=[line | {"decision": "rollback"}]).kind == "neutral"
    found = of(run, cfg, {}, not_finite=[line | {"decision": "stop"}])
    assert found.kind == "bad"
    assert found.status == "Stopped: not_finite at step 7 of PPO. No number."
    assert found.steps[0].startswith("Change ppo.x (lower), then `chatllama run ")


@pytest.mark.parametrize(
    ("gold", "kind", "words", "absent"),
    [
        (2.0, "good", "`chatllama chat ", "ppo.kl_coef"),
        (1.01, "good", "lower ppo.kl_coef for a larger change", "`chatllama chat "),
        (-1.0, "neutral", "Raise ppo.kl_coef", "`chatllama chat "),
    ],
)
def test_a_finished_run_says_what_to_do_next(
    tmp_path: Path, gold: float, kind: str, words: str, absent: str
) -> None:
    run, cfg = made(tmp_path, {stage: {} for stage in ALL})
    roles = {"sft": {"gold_mean": 1.0, "gold_se": 0.1}}
    roles["ppo"] = {"gold_mean": gold, "gold_se": 0.1, "response_length": 9.0}
    found = of(run, cfg, roles)
    assert (found.kind, found.status) == (kind, "Finished")
    assert words in " ".join(found.steps) and absent not in " ".join(found.steps)


def test_without_gold_the_page_says_what_is_not_shown(tmp_path: Path) -> None:
    run, _ = made(tmp_path, {stage: {} for stage in ALL})
    scored = {"score_mean": 1.0, "score_se": 0.1}
    write_json(run.summary, {"sft": scored, "ppo": scored})
    assert "It does not show that people would prefer" in write_report(run).read_text("utf-8")
    write_json(run.summary, {"sft": scored | {"gold_mean": 1.0}, "ppo": scored})
    assert "It does not show that people would prefer" not in write_report(run).read_text("utf-8")


def test_bars_are_of_what_was_measured() -> None:
    summary = {"base": {"score_mean": -1.0}, "ppo": {"gold_mean": 2.0, "gold_se": 0.5}}
    assert judged_means(summary) == {
        "Gold score": {"PPO": (2.0, 0.5)},
        "Reward score (raw)": {"base": (-1.0, 0.0)},
    }


# --- warnings


def test_every_warning_about_the_reward_model_has_its_key() -> None:
    folder = Path(__file__).parents[2] / "trainers" / "reward" / "diagnosis"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    names = set(re.findall(r'Concern\("(\w+)"', source))
    named = {"repeated_pairs", "contradicted_pairs", "overconfident", "underconfident"}
    named |= {"no_better_than_length", "no_better_than_words"}  # whose names are put together
    assert len(names) > 9 and names | named == set(KEYS)


def test_the_gravest_warning_is_first() -> None:
    def line(severity: str) -> dict[str, Any]:
        told = {"name": severity, "step": 3, "figure": 1.0, "threshold": 0.5, "message": "m"}
        return told | {"causes": ["c"], "knob": "k", "severity": severity, "decision": "go on"}

    health = {name: [line(name)] for name in ("note", "warning", "fatal")}
    doubts = [{"name": "no_better_than_chance", "text": "t", "knob": "k"}]
    found = _warnings(health, {"warnings": doubts})
    severities = [each["severity"] for each in found]
    assert severities == ["fatal", "fatal", "warning", "note"]
    health["note"].append(line("fatal"))
    assert [each["name"] for each in _warnings(health, None)] == ["note", "fatal", "warning"]


# --- the page's parts


def test_parts_are_in_the_order_in_which_they_are_read(tmp_path: Path) -> None:
    run, _ = made(tmp_path, {stage: {} for stage in ALL})
    write_json(run.result("reward"), WEAK)
    write_json(run.summary, {"reward": WEAK, "sft": {"score_mean": 1.0, "score_se": 0.1},
                             "ppo": {"score_mean": 2.0, "score_se": 0.1}})  # fmt: skip
    append_lines(run.metrics("ppo"), [{"step": 1, "ppo/eos_rate": 1.0, "ppo/rm_score_mean": 1.5}])
    append_lines(run.stage("ppo") / "health.jsonl", [])
    page = write_report(run).read_text(encoding="utf-8")
    links, main = page.split("<main>")
    ids = re.findall(r'href="#(\w+)"', links)
    assert ids == ["results", "answers", "during", "warnings", "reward", "curves", "origin"]
    assert sorted(ids, key=lambda name: main.index(f'id="{name}"')) == ids
    # Held-out scores before and after PPO are points at both ends of its curve.
    assert "held out from 1 at step 0 to 2 at step 1" in page


def test_terms_have_tooltips_once_and_text_stays_escaped() -> None:
    found = str(_terms("<b> 3 standard errors, 2 nats; nats"))
    assert found.startswith("&lt;b&gt; 3 <abbr ") and found.count("<abbr") == 2
    assert ">standard errors</abbr>, 2 <abbr" in found and found.endswith(">nats</abbr>; nats")
