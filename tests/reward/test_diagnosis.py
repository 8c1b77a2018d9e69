"""The reward model diagnosis: planted faults are found, and healthy data and scores pass."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_llama

from chatllama.config.model import LoraSection
from chatllama.config.schema import RewardSection
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters
from chatllama.model.scoring import score_sequences
from trainers.reward import evaluate
from trainers.reward.data import Preferences
from trainers.reward.diagnosis.data_report import data_concerns, examine_data, rows_of, word_gaps
from trainers.reward.diagnosis.model_report import (
    close_diagnosis,
    examine_model,
    model_concerns,
    open_diagnosis,
)
from trainers.reward.evaluate import Member, PaddingError, padding_error

FINE = PaddingError(1e-6, 1e-3)
PROMPT = 3
GOOD, BAD = 50, 51  # words that only better or only worse answers have


def example(number: int, *answers: list[int], where: str = "") -> dict[str, Any]:
    prompt = [1, 10 + number % 30, 10 + number // 30]
    return {
        "answer_ids": [[*prompt, *answer, 2] for answer in answers],
        "ranks": list(range(len(answers))),
        "ratings": [0.0] * len(answers),
        "prompt_length": PROMPT,
        "where": where or f"f.jsonl:{number}",
    }


def pairs(count: int, start: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of equal mean lengths; the words tell nothing."""
    rng = np.random.default_rng(seed)
    return [
        example(start + n, *(rng.integers(60, 90, rng.integers(3, 12)).tolist() for _ in range(2)))
        for n in range(count)
    ]


def preferences(train: list[dict], held_out: list[dict] | None = None, **kwargs) -> Preferences:
    held_out = held_out or pairs(250, start=500, seed=1)
    return Preferences(Dataset.from_list(train), Dataset.from_list(held_out), {}, **kwargs)


def names(data: Preferences) -> list[str]:
    return [concern.name for concern in data_concerns(examine_data(data))]


# --- data


def test_a_single_held_out_pair_is_a_pair():
    found = examine_data(preferences(pairs(30), pairs(1, start=500)))
    assert found["held_out"]["pairs"] == found["held_out"]["prompts"] == 1


def test_clean_data_raise_nothing_and_are_counted():
    train = [*pairs(300), example(400, [60, 61], [62], [63, 64, 65])]
    found = examine_data(preferences(train))
    assert [c.name for c in data_concerns(found)] == []
    part = found["training"]
    assert (part["prompts"], part["answers"], part["pairs"]) == (301, 603, 303)
    assert part["answers_per_prompt"] == {2: 300, 3: 1}
    assert (part["repeated_pairs"], part["contradicted_pairs"]) == (0, 0)


def test_repeated_and_contradicting_labels_are_found_with_their_places():
    train = pairs(100)
    again = {**train[3], "where": "f.jsonl:1000"}
    twisted = {**train[7], "answer_ids": train[7]["answer_ids"][::-1], "where": "f.jsonl:1001"}
    found = examine_data(preferences([*train, again, again, twisted]))  # `again` once: one place
    part = found["training"]
    assert (part["repeated_pairs"], part["contradicted_pairs"]) == (1, 1)
    assert sorted(part["contradictions"][0]) == ["f.jsonl:1001", "f.jsonl:7"]
    assert names(preferences([*train[:20], again, twisted])) == [
        "repeated_pairs",
        "contradicted_pairs",
    ]


def test_held_out_pairs_that_were_trained_on_are_found():
    train = pairs(300)
    assert names(preferences(train, [*pairs(250, start=500, seed=1), train[5]])) == ["shared_pairs"]


def test_records_that_were_left_out_are_named():
    data = preferences(pairs(300))
    object.__setattr__(data, "left_out", {"chosen equals rejected": 9, "an answer is long": 200})
    assert names(data) == ["identical_answers", "left_out"]


def test_length_baseline():
    long = [example(500 + n, [60 + n % 20] * 5, [70] * (3 if n % 4 else 8)) for n in range(240)]
    found = examine_data(preferences(pairs(300), long))
    longer = found["held_out"]["longer_preferred"]
    assert longer["value"] == pytest.approx(0.75)
    assert longer["low"] < 0.75 < longer["high"]
    assert "length_tells" in [c.name for c in data_concerns(found)]


def test_few_held_out_pairs_are_named():
    assert names(preferences(pairs(300), pairs(50, start=500))) == ["few_held_out"]


def worded(count: int, flipped: int = 0, start: int = 0) -> list[dict[str, Any]]:
    """Pairs in which one word tells the better answer, but for the first `flipped`."""
    rows = pairs(count, start=start, seed=2)
    for number, row in enumerate(rows):
        good, bad = row["answer_ids"] if number >= flipped else row["answer_ids"][::-1]
        good.insert(-1, GOOD)
        bad.insert(-1, BAD)
    return rows


def test_words_alone_by_hand():
    train = rows_of(Dataset.from_list([example(0, [50, 60], [51, 60]), example(1, [50], [52])]))
    judged = rows_of(Dataset.from_list([example(2, [50, 70], [51])]))
    # Word 50: in 2 better, 0 worse; 51: 0 and 1; 70 and the rest: unknown. Laplace adds 1.
    expected = np.log(3 / 1) - np.log(1 / 2)
    assert word_gaps(train, judged).tolist() == pytest.approx([expected])


def test_wrong_labels_are_suspected_before_training():
    found = examine_data(preferences(worded(300, flipped=45), worded(250, start=500)))
    assert found["word_accuracy"]["value"] > 0.95
    assert found["flips"]["share"] == pytest.approx(0.15, abs=0.04)
    places = {int(s["where"].split(":")[1]) for s in found["flips"]["suspects"]}
    assert places <= set(range(45))  # the flipped ones
    assert "suspected_flips" in [c.name for c in data_concerns(found)]
    assert "suspected_flips" not in names(preferences(worded(300), worded(250, start=500)))


# --- model


def gold_gaps(rows: list[dict[str, Any]], accuracy: float, gap: float = 2.0) -> list[float]:
    """Scores under which that share of the pairs is right, independent of everything else."""
    right = np.random.default_rng(3).permutation(len(rows)) < accuracy * len(rows)
    return [s for ok in right for s in ((gap / 2, -gap / 2) if ok else (-gap / 2, gap / 2))]


def examined(rows: list[dict], *scores: list[float], **kwargs) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "section": RewardSection(),
        "bayes_accuracy": None,
        "padding": FINE,
    }
    return examine_model(Dataset.from_list(rows), scores, **{**arguments, **kwargs})


def model_names(found: dict[str, Any], words: float = 0.5) -> list[str]:
    return [concern.name for concern in model_concerns(found, words)]


HELD_OUT = pairs(1000, seed=5)
CALIBRATED = 0.8808  # sigmoid(2)


def test_a_healthy_model_raises_nothing():
    found = examined(HELD_OUT, gold_gaps(HELD_OUT, CALIBRATED), bayes_accuracy=0.9)
    assert model_names(found) == []
    assert found["accuracy"]["value"] == pytest.approx(0.881)
    assert found["accuracy"]["low"] == pytest.approx(0.859, abs=2e-3)  # Wilson, 881 of 1000
    assert found["calibration"]["error"] < 0.005
    assert abs(found["length"]["score_correlation"]) < 0.1
    assert sum(found["gaps"]["shares"]) == pytest.approx(1.0)
    assert found["disagreement"] == 0.0


def test_ties_count_half():
    assert examined(HELD_OUT, [0.0] * 2000)["accuracy"]["value"] == 0.5


def test_guessing_and_inverted_labels():
    assert "no_better_than_chance" in model_names(examined(HELD_OUT, gold_gaps(HELD_OUT, 0.51)))
    rows = [*HELD_OUT, *(example(n, [60, 61], [62], where=f"other:{n}") for n in range(200))]
    scores = gold_gaps(HELD_OUT, CALIBRATED) + [-1.0, 1.0] * 200
    (inverted,) = [c for c in model_concerns(examined(rows, scores), 0.5) if c.name == "inverted"]
    assert "accuracy on other is 0.000" in inverted.text


def test_a_model_of_length_alone_is_found():
    rows = pairs(1000, seed=6)
    for number, row in enumerate(rows):  # in 80 % the better answer is the longer one
        short, long = sorted(row["answer_ids"], key=len)
        row["answer_ids"] = [long, short] if number % 5 else [short, long]
    scores = [len(ids) / 4 for row in rows for ids in row["answer_ids"]]
    found = examined(rows, scores)
    assert found["accuracy"]["value"] > 0.75
    assert found["length"]["controlled_accuracy"]["value"] == pytest.approx(0.5)
    assert found["length"]["score_correlation"] > 0.99
    assert {"no_better_than_length", "length_driven", "length_bias"} <= set(model_names(found))
    assert model_names(examined(HELD_OUT, gold_gaps(HELD_OUT, CALIBRATED)), words=0.9) == [
        "no_better_than_words"
    ]


def test_length_controlled_accuracy_by_hand():
    rows = [example(n, [60] * a, [61] * b) for n, (a, b) in enumerate([(9, 4)] * 6 + [(4, 9)] * 4)]
    scores = [1.0, 0.0] * 6 + [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    length = examined(rows, scores)["length"]
    assert length["better_is_longer"]["value"] == 1.0
    assert length["better_is_shorter"]["value"] == 0.25
    assert length["controlled_accuracy"]["value"] == pytest.approx(0.625)  # 0.7 uncontrolled
    # One more token for the end of turn: 10 and 5, half as long.
    shares = {(b["from"], b["to"]): b["share"] for b in length["by_difference"]}
    assert shares[0.1, 0.5] == pytest.approx(0.6) and shares[-0.5, -0.1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("longer", "shorter"), [((6, 6), (1, 4)), ((30, 40), (10, 20)), ((9, 9), (9, 9))]
)
def test_the_interval_of_controlled_accuracy_by_hand(
    longer: tuple[int, int], shorter: tuple[int, int]
):
    lengths = [(9, 4)] * longer[1] + [(4, 9)] * shorter[1]
    rows = [example(n, [60] * a, [61] * b) for n, (a, b) in enumerate(lengths)]
    right = [n < wins for wins, count in (longer, shorter) for n in range(count)]
    scores = [s for ok in right for s in ((1.0, 0.0) if ok else (0.0, 1.0))]
    found = examined(rows, scores)["length"]["controlled_accuracy"]
    (one, low_one, high_one), (two, low_two, high_two) = map(wilson_of, (longer, shorter))
    # The mean of two independent numbers: half-widths add in squares, then half.
    mean = (one + two) / 2
    below = ((one - low_one) ** 2 + (two - low_two) ** 2) ** 0.5 / 2
    above = ((high_one - one) ** 2 + (high_two - two) ** 2) ** 0.5 / 2
    numbers = [found[key] for key in ("value", "low", "high")]
    assert numbers == pytest.approx([mean, mean - below, mean + above])


def wilson_of(part: tuple[int, int]) -> tuple[float, float, float]:
    return wilson(*part)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float, float]:
    """A share and the roots of (p - share)^2 = z^2 p (1 - p) / count (Wilson 1927)."""
    share, a = right / count, 1 + z * z / count
    b, c = -(2 * share + z * z / count), share * share
    root = (b * b - 4 * a * c) ** 0.5
    return share, (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize("answers", [2, 3, 4])
def test_the_accuracys_interval_counts_prompts(answers: int):
    """K answers make K (K - 1) / 2 pairs, which are not independent."""
    rows = [example(n, *([60 + i] for i in range(answers))) for n in range(30)]
    scores = [float(-i if n < 24 else i) for n in range(30) for i in range(answers)]
    found = examined(rows, scores)["accuracy"]
    expected = wilson(24, 30)
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx(list(expected))


@pytest.mark.parametrize(("accuracy", "count"), [(0.75, 100), (0.9, 400), (0.6, 50)])
def test_the_calibration_error_of_chance_by_hand(accuracy: float, count: int):
    """The mean distance of the share of right answers from the expected one, drawn many times."""
    rows, gap = pairs(count, seed=4), float(np.log(accuracy / (1 - accuracy)))
    found = examined(rows, gold_gaps(rows, accuracy, gap=gap))["calibration"]
    drawn = np.random.default_rng(0).binomial(count, accuracy, 200_000) / count
    assert found["chance_error"] == pytest.approx(np.abs(drawn - accuracy).mean(), rel=0.02)


def test_calibration_warnings_and_their_limits():
    scores = gold_gaps(HELD_OUT, 0.75, gap=4.0)
    found = examined(HELD_OUT, scores)
    assert model_names(found)[0] == "overconfident"
    assert found["calibration"]["best_scale"] == pytest.approx(np.log(3) / 4, rel=0.01)
    assert "underconfident" in model_names(examined(HELD_OUT, gold_gaps(HELD_OUT, 0.9, gap=0.2)))
    # With a margin sigmoid(gap) is no probability, so nothing is said about it.
    found = examined(HELD_OUT, scores, section=RewardSection(margin_coef=1.0))
    assert "overconfident" not in model_names(found)


def test_below_bayes_and_padding():
    scores = gold_gaps(HELD_OUT, CALIBRATED)
    assert model_names(examined(HELD_OUT, scores, bayes_accuracy=0.95)) == ["below_bayes"]
    assert model_names(examined(HELD_OUT, scores, padding=PaddingError(2.0, 1e-3))) == ["padding"]
    nan = PaddingError(float("nan"), 1e-3)
    assert model_names(examined(HELD_OUT, scores, padding=nan)) == ["padding"]


def test_wrong_held_out_labels_are_suspected():
    rng = np.random.default_rng(8)
    gaps = np.abs(rng.normal(0, 4, 1000)) + 3
    gaps[:100] *= -1
    scores = [s for gap in gaps for s in (gap, 0.0)]
    found = examined(HELD_OUT, scores)
    assert found["flips"]["share"] == pytest.approx(0.1, abs=0.02)
    assert {int(s["where"].split(":")[1]) for s in found["flips"]["suspects"]} <= set(range(100))
    assert "suspected_flips" in model_names(found)


def test_an_ensemble_is_examined_by_its_mean():
    one, two = gold_gaps(HELD_OUT, 0.9), [-s / 2 for s in gold_gaps(HELD_OUT, 0.9)]
    found = examined(HELD_OUT, one, two)
    assert found["accuracy"]["value"] == 0.9  # the first one's scores are larger
    assert [round(m["value"], 3) for m in found["members"]] == [0.9, 0.1]
    assert found["disagreement"] == 1.0


def test_the_diagnosis_is_written_and_printed(tmp_path, capsys: pytest.CaptureFixture[str]):
    import json

    from chatllama.runs.folder import RunFolder

    run = RunFolder(tmp_path)
    data = preferences(pairs(300), HELD_OUT, bayes_accuracy=0.9)
    data_findings = open_diagnosis(run, data)
    first = json.loads((run.root / "reward" / "doctor.json").read_text())
    assert first["model"] is None and first["data"]["training"]["pairs"] == 300
    members = [Member(0.3, gold_gaps(HELD_OUT, 0.51), FINE), Member(0.3, [0.0] * 2000, FINE)]
    close_diagnosis(run, RewardSection(ensemble=2), data, members, data_findings)
    second = json.loads((run.root / "reward" / "doctor.json").read_text())
    assert "no_better_than_chance" in [w["name"] for w in second["warnings"]]
    out = capsys.readouterr().out
    assert "300 training pairs of 300 prompts" in out and "no warnings" in out
    assert "warning no_better_than_chance: accuracy 0.510 (0.479-0.541)" in out
    assert "members 0.510, 0.500" in out


# --- padding


def reward_model(dtype: torch.dtype = torch.float32) -> RoleModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RoleModel(
            tiny_llama(dtype=dtype),
            {"reward": Adapter(LoraSection(r=4), trainable=True)},
            ("reward",),
        )
        for parameter in adapter_parameters(model, "reward"):
            parameter.data.normal_(std=0.2)
    return model


@pytest.mark.parametrize("pad_id", [0, 2, 77])  # 2 is the EOS
def test_padding_changes_no_score(pad_id: int):
    found = padding_error(reward_model(), Dataset.from_list(pairs(10)), pad_id)
    assert found.error < 1e-5 < found.tolerance


def test_bfloat16_is_within_its_tolerance():
    found = padding_error(reward_model(torch.bfloat16), Dataset.from_list(pairs(10)), 0)
    assert 0 < found.error < found.tolerance


def test_padding_that_is_read_as_text_is_found(monkeypatch: pytest.MonkeyPatch):
    def blind(model: RoleModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return score_sequences(model, tokens, torch.ones_like(mask))

    monkeypatch.setattr(evaluate, "score_sequences", blind)
    found = padding_error(reward_model(), Dataset.from_list(pairs(10)), 0)
    assert found.error > found.tolerance
