"""Held-out answers measured: gold, win rates and KL against numbers of plain Python."""

import json
import math
import statistics
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import STOPS, TinyRun, make_run, nudge

from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import read_lines
from trainers.ppo.evaluate import EVALUATION_SEED, Answers, evaluate_roles, measure_policy, win_rate
from trainers.ppo.rollout import sample_responses
from trainers.ppo.train import PpoTrainer

GOLD = "ppo_runs:count_words"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("evaluate"), tiny_tokenizer_dir)


def evaluate(trainer: PpoTrainer, folder: Path) -> dict[str, Any]:
    run = RunFolder(folder)
    arguments = (trainer.collector, trainer.prompts)
    evaluate_roles(trainer.cfg, run, *arguments)
    return json.loads(run.evaluation.read_text())


def answers_of(trainer: PpoTrainer, role: str, count: int) -> list[list[int]]:
    prompts = trainer.prompts.held_out["input_ids"][:count]
    seed = (trainer.cfg.seed, EVALUATION_SEED)
    return sample_responses(trainer.engine, role, prompts, trainer.cfg.generation, STOPS, seed)


def test_gold_scores_and_win_rates_by_hand(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(evaluation={"num_prompts": 4, "gold": GOLD})
    nudge(trainer)
    found = evaluate(trainer, tmp_path)
    assert found["num_prompts"] == 4 and list(found["roles"]) == ["base", "sft", "ppo"]
    golds = {}
    for name, role in (("base", "base"), ("sft", "reference"), ("ppo", "policy")):
        answers = answers_of(trainer, role, 4)
        texts = [trainer.stop_tokens.decode(answer) for answer in answers]
        golds[name] = [20.0 + len(text) for text in texts]  # "question N": two words
        numbers = found["roles"][name]
        assert numbers["gold_mean"] == pytest.approx(statistics.fmean(golds[name]))
        assert numbers["gold_se"] == pytest.approx(statistics.stdev(golds[name]) / 2)
        lengths = [len(answer) for answer in answers]
        assert numbers["response_length"] == pytest.approx(statistics.fmean(lengths))
        ended = [answer[-1] in STOPS for answer in answers]
        assert numbers["eos_rate"] == pytest.approx(sum(ended) / 4)
        assert [sample[name] for sample in found["samples"]] == texts
        assert [sample["gold"][name] for sample in found["samples"]] == golds[name]
    assert found["judged"]["values"] == golds and found["judged"]["by"] == f"gold {GOLD}"
    pairs = list(zip(golds["ppo"], golds["sft"], strict=True))
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert found["roles"]["ppo"]["win_rate"] == wins / 4
    assert "win_rate" not in found["roles"]["sft"]
    expected = [f"question {n}" for n in range(7, 11)]
    assert [sample["prompt"] for sample in found["samples"]] == expected


def test_texts_are_kept_of_the_first_answers_and_of_the_telling_ones(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainers.ppo.evaluate.NUM_SHOWN", 1)
    trainer = tiny.trainer(evaluation={"num_prompts": 5, "gold": GOLD})
    nudge(trainer)
    found = evaluate(trainer, tmp_path)
    ours, theirs = (found["judged"]["values"][name] for name in ("ppo", "sft"))
    rows = [sample["row"] for sample in found["samples"]]
    assert rows[0] == 0 and rows == sorted(rows) and len(rows) <= 5
    for row in (ours.index(min(ours)), ours.index(sorted(ours)[2])):
        assert row in rows
    assert max(ours) in [sample["gold"]["ppo"] for sample in found["samples"]]
    changes = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert min(changes) >= 0 or changes.index(min(changes)) in rows


def test_without_gold_the_reward_model_judges(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(evaluation={"num_prompts": 5})
    nudge(trainer)
    found = evaluate(trainer, tmp_path)
    scores = {name: [s["score"][name] for s in found["samples"]] for name in ("sft", "ppo")}
    numbers = found["roles"]["ppo"]
    assert numbers["score_mean"] == pytest.approx(statistics.fmean(scores["ppo"]))
    assert numbers["score_se"] == pytest.approx(statistics.stdev(scores["ppo"]) / 5**0.5)
    pairs = zip(scores["ppo"], scores["sft"], strict=True)
    wins = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
    assert numbers["win_rate"] == wins / 5
    assert "gold_mean" not in numbers


def test_who_judges_is_told_by_the_reward_models_weights(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(evaluation={"num_prompts": 2})
    judges: list[str] = []
    for number, weights in enumerate(("a", "a", "b")):
        adapter = RunFolder(tmp_path / str(number)).reward_adapter
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_text(weights)
        judges.append(evaluate(trainer, tmp_path / str(number))["judged"]["by"])
    assert judges[0].startswith("score ") and judges[0] == judges[1] != judges[2]
    more = tiny.trainer(evaluation={"num_prompts": 3})
    prompts = [evaluate(each, tmp_path)["judged"]["prompts"] for each in (trainer, trainer, more)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_policys_kl_is_measured_on_its_own_answers(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(evaluation={"num_prompts": 4})
    equal = evaluate(trainer, tmp_path)["roles"]
    assert equal["ppo"]["kl"] == 0 and "kl" not in equal["sft"] and "kl" not in equal["base"]
    assert (
        equal["ppo"]["win_rate"] == 0.5 and equal["ppo"]["score_mean"] == equal["sft"]["score_mean"]
    )
    nudge(trainer)
    numbers = evaluate(trainer, tmp_path)["roles"]["ppo"]
    records = trainer.prompts.held_out.select(range(4)).to_list()
    rollout, _ = trainer.collector.collect("policy", records, (trainer.cfg.seed, EVALUATION_SEED))
    kls = [sum(rollout.kl[row, : rollout.lengths[row]].tolist()) for row in range(4)]
    # Nats per answer, not per token or slot.
    assert numbers["kl"] == pytest.approx(statistics.fmean(kls)) and abs(numbers["kl"]) > 1e-3
    assert numbers["kl_se"] == pytest.approx(statistics.stdev(kls) / 2)


def test_no_more_prompts_than_there_are(tiny: TinyRun, tmp_path: Path):
    assert evaluate(tiny.trainer(evaluation={"num_prompts": 99}), tmp_path)["num_prompts"] == 5


def test_without_prompts_nothing_is_written(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(evaluation={"num_prompts": 0})
    arguments = (trainer.collector, trainer.prompts)
    evaluate_roles(trainer.cfg, RunFolder(tmp_path), *arguments)
    assert measure_policy(trainer.cfg, RunFolder(tmp_path), *arguments, 1) == {}
    assert not any(tmp_path.iterdir())


def test_measuring_the_policy_gives_the_evaluations_numbers(tiny: TinyRun, tmp_path: Path):
    gold = "ppo_runs:gold_of_batches"  # with columns, asynchronous, all answers at once
    trainer = tiny.trainer(evaluation={"num_prompts": 3, "gold": gold})
    nudge(trainer)
    run = RunFolder(tmp_path)
    arguments = (trainer.cfg, run, trainer.collector, trainer.prompts)
    found = measure_policy(*arguments, 2)
    numbers = evaluate(trainer, tmp_path)["roles"]["ppo"]
    # the KL is called what it is called in training
    renamed = {"kl": "kl_sequence", "kl_se": "kl_sequence_se"}
    assert found == {
        f"ppo/eval_{renamed.get(name, name)}": value
        for name, value in numbers.items()
        if not name.startswith("win_rate")
    }
    run.overoptimisation.write_text("of earlier answers")
    assert measure_policy(*arguments, 1) == found and not run.overoptimisation.exists()
    lines = read_lines(run.evaluations)  # of step 2 and the end are later, from before a rollback
    assert [line["step"] for line in lines] == [0, 1]
    assert [each["text"] for each in lines[0]["prompts"]] == [f"question {n}" for n in (7, 8, 9)]
    kl = statistics.fmean(lines[1]["kl"])
    assert kl == pytest.approx(found["ppo/eval_kl_sequence"])
    assert statistics.fmean(lines[1]["scores"]) == pytest.approx(found["ppo/eval_score_mean"])
    golds = [1000.0 * n + len(a) for n, a in zip((7, 8, 9), lines[1]["answers"], strict=True)]
    assert statistics.fmean(golds) == pytest.approx(found["ppo/eval_gold_mean"])


def test_one_held_out_prompt_gives_metrics_without_errors(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(evaluation={"num_prompts": 1, "gold": GOLD})
    run = RunFolder(tmp_path)
    found = measure_policy(trainer.cfg, run, trainer.collector, trainer.prompts, 1)
    assert "ppo/eval_gold_mean" in found and not any(name.endswith("_se") for name in found)
    assert all(math.isfinite(value) for value in found.values())


def test_an_average_is_measured_too(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(ppo={"ema_decay": 0.5})
    nudge(trainer)
    roles = evaluate(trainer, tmp_path)["roles"]
    assert list(roles) == ["base", "sft", "ppo", "ema"]
    # the average has not moved yet: it is SFT
    assert roles["ema"]["score_mean"] == roles["sft"]["score_mean"] != roles["ppo"]["score_mean"]


def test_sft_is_sft_after_the_reference_was_refreshed(tiny: TinyRun, tmp_path: Path):
    trainer = tiny.trainer(ppo={"reference_refresh_every": 1})
    before = evaluate(trainer, tmp_path)["roles"]
    trainer.advance(trainer.start())
    after = evaluate(trainer, tmp_path)["roles"]
    assert after["sft"] == before["sft"]
    assert after["ppo"]["score_mean"] != before["ppo"]["score_mean"]
    assert after["ppo"]["kl"] != 0


def test_where_the_base_is_sfts_result_it_has_no_row(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: TinyRun
):
    full = TinyRun(tiny.base, tmp_path_factory.mktemp("full"))
    make_run(full.config(lora=None))
    trainer = full.trainer(lora=None)
    assert list(evaluate(trainer, tmp_path)["roles"]) == ["sft", "ppo"]


def test_ensemble_members_disagree(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: TinyRun
):
    both = TinyRun(tiny.base, tmp_path_factory.mktemp("both"))
    make_run(both.config(), members=2)
    trainer = both.trainer(evaluation={"num_prompts": 2})
    roles = evaluate(trainer, tmp_path)["roles"]
    assert {"ensemble_disagreement"} <= set(roles["sft"])
    assert roles["sft"]["ensemble_disagreement"] > 0


def test_the_same_answer_has_the_same_value():
    start = Answers(["a", "b", "c"], [[5, 2], [6, 2], [7]], [1.0, 2.0, 3.0], {}, {})
    ours = Answers(["a", "b", "c"], [[5, 2], [6, 8], [7, 2]], [1.000001, 2.5, 3.5], {}, {})
    # Equal texts may be other tokens: the last ends, the start's does not.
    assert ours.judged_like(start).goodness == [1.0, 2.5, 3.5]


def test_roles_that_answer_alike_tie(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each role's batch rounds otherwise."""
    trainer, calls = tiny.trainer(evaluation={"num_prompts": 4}), count(1)
    collect = trainer.collector.collect

    def rounding(_: Any, *given: Any) -> Any:
        rollout, texts = collect(*given)
        return replace(rollout, scores=rollout.scores + 1e-6 * next(calls)), texts

    monkeypatch.setattr(type(trainer.collector), "collect", rounding)
    found = evaluate(trainer, tmp_path)
    assert found["roles"]["ppo"]["win_rate"] == 0.5
    assert found["judged"]["values"]["ppo"] == found["judged"]["values"]["sft"]


def test_win_rate_by_hand():
    found = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 1.0])
    assert found["win_rate"] == (1 + 0.5) / 4
    assert found["win_rate_low"] < 0.375 < found["win_rate_high"]


@pytest.mark.slow
def test_the_policy_trains_on_as_before(tiny: TinyRun):
    """Measuring consumes no random numbers of training and leaves no trace in the models."""
    plain, measured = tiny.trainer(), tiny.trainer(ppo={"eval_every": 1})
    states = [plain.start(), measured.start()]
    for _ in range(2):
        plain_step, measured_step = plain.advance(states[0]), measured.advance(states[1])
        states = [plain_step[0], measured_step[0]]
        assert torch.equal(plain_step[1].tokens, measured_step[1].tokens)
        for name, value in plain_step[3].items():
            assert measured_step[3][name] == value, name
