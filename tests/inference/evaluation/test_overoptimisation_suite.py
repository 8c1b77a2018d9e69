"""`eval --suite overoptimisation` on a run of random weights: whose answers, judged by whom."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from generation_runs import PROMPTS, TEXTS, make_run, reopened

from chatllama import cli
from chatllama.inference.answerer import with_answer
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import append_lines, read_lines

ANSWERS = {0: ["a b", "c", "d e f"], 5: ["a", "b c", "d e"], 10: ["x y z", "u v w", "a b c d"]}


def letters(prompt: str, response: str) -> float:
    return 10.0 * len(prompt) + len(set(response))


def evaluated(folder: Path, tokenizer_dir: Path) -> RunFolder:
    run = make_run(folder, tokenizer_dir)
    run.config.write_text(f"{run.config.read_text()}sft: {{data: [{{path: p}}]}}\n")
    asked = [
        {"messages": p.messages, "text": p.content, "where": p.where, "columns": "{}"}
        for p in PROMPTS[:3]
    ]
    lines: list[dict[str, Any]] = [
        {"step": step, "answers": answers, "scores": [0.1 * step, 0.2, 0.3]}
        | ({"kl": [step / 2, 0.5, 0.5]} if step else {"prompts": asked})
        for step, answers in ANSWERS.items()
    ]
    append_lines(run.evaluations, lines)
    return run


def curves(run: RunFolder, *arguments: str) -> dict[str, Any]:
    words = ["eval", str(run.root), "--suite", "overoptimisation", "--n", "3", *arguments]
    assert cli.main(words) == 0
    return json.loads(run.overoptimisation.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return evaluated(tmp_path_factory.mktemp("curve") / "run", tiny_tokenizer_dir)


@pytest.mark.slow
def test_a_function_judges_samples_of_the_start_and_kept_answers(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    found = curves(run, "--gold", "test_overoptimisation_suite:letters")
    shown = capsys.readouterr()
    assert "gold: test_overoptimisation_suite:letters" in shown.out and run.report.is_file()
    samples = read_lines(run.root / "benchmarks" / "overoptimisation" / "sft-3x3.jsonl")
    places = [(line["id"], line["sample"]) for line in samples]
    assert len(places) == 9 and places[:4] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    golds = {id(s): letters(s["prompt"][0]["content"], s["response"]) for s in samples}
    assert len(set(golds.values())) > 4
    one, two, three = found["best_of_n"]
    assert [point["n"] for point in (one, two, three)] == [1, 2, 3]
    assert one["gold"] == pytest.approx(fmean(golds.values()))
    assert one["proxy"] == pytest.approx(fmean(line["score"] for line in samples))
    best = [max(samples[i : i + 3], key=lambda line: line["score"]) for i in (0, 3, 6)]
    assert three["gold"] == pytest.approx(fmean(golds[id(each)] for each in best))
    assert three["proxy"] == pytest.approx(fmean(line["score"] for line in best))
    texts = TEXTS[:3]
    for point, (step, answers) in zip(found["ppo"], ANSWERS.items(), strict=True):
        assert point["step"] == step
        assert point["gold"] == pytest.approx(fmean(map(letters, texts, answers)))
        assert point["kl"] == pytest.approx((step / 2 + 1) / 3 if step else 0)
    again = curves(run, "--gold", "test_overoptimisation_suite:letters")
    assert again == found and "tokens of answers a second" not in capsys.readouterr().err


@pytest.mark.slow
def test_without_gold_the_worst_of_the_ensemble_judges(run: RunFolder) -> None:
    answerer = reopened(run, "reference")
    rows = [
        [answerer.render(with_answer(PROMPTS[i].messages, answers[i]), False) for i in range(3)]
        for answers in ANSWERS.values()
    ]
    members = []
    for role in ("reward", "reward_1"):
        answerer.loaded.reward_roles[:] = [role]
        members.append([answerer.scores(each) for each in rows])
    found = curves(run)
    assert found["gold"] == "the worst member of the run's own reward ensemble"
    for point, *scores in zip(found["ppo"], *members, strict=True):
        assert point["gold"] == pytest.approx(fmean(map(min, *scores)), rel=1e-4)
    other = curves(run, "--gold", str(run.reward_adapter), "--limit", "2")
    assert other["prompts"] == 2 and other["gold"] == f"reward model {run.reward_adapter}"
    assert other["ppo"][0]["gold"] == pytest.approx(fmean(members[0][0][:2]), rel=1e-4)


def test_what_cannot_be_judged_is_refused(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    suite = ["eval", str(tmp_path), "--suite"]

    def refused(config: str, *arguments: str) -> str:
        run.config.write_text(f"run_dir: {tmp_path}\nbackbone: {{path: m}}\n{config}")
        assert cli.main([*suite, *arguments]) == 2
        return capsys.readouterr().err

    assert "holds no answers of PPO's start" in refused("", "overoptimisation")
    run.stage("ppo").mkdir()
    append_lines(run.evaluations, [{"step": 0, "prompts": [{}], "answers": [""], "scores": [0.0]}])
    assert "needs a judge that PPO did not climb" in refused("", "overoptimisation")
    config = "ppo: {rewards: [{function: 'm:f'}], data: [{path: p}]}\n"
    assert "is not the run's reward model alone" in refused(config, "overoptimisation")
    gold = ("overoptimisation", "--gold", "m_that_is_not:f")
    assert "m_that_is_not" in refused("", *gold)
    gone = ("overoptimisation", "--gold", "gone/away")
    assert "--gold gone/away: no run or reward adapter is there" in refused("", *gone)
    assert "--gold is not for mmlu" in refused("", "mmlu", "--gold", "m:f")
    assert "--shots is not for overoptimisation" in refused("", "overoptimisation", "--shots", "1")
    known = ("overoptimisation", "--gold", "math:pow")
    assert "one prompt has no standard error" in refused("", *known)
