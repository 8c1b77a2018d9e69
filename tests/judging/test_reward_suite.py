"""Accuracy of reward models on files of every layout, by hand and against transformers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_runs import make_run
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from chatllama import cli
from chatllama.config.model import ChatSection
from chatllama.exporting.templates import jinja_template
from chatllama.runs.folder import RunFolder
from chatllama.text.tokenizer import load_tokenizer
from trainers.judging.reward_suite import Labelled, measure, read_labelled, table
from trainers.judging.rewardbench import SECTIONS, section_scores

pytestmark = pytest.mark.usefixtures("data_cache")


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    as_array = path.suffix == ".json"
    text = json.dumps(records) if as_array else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text)
    return str(path)


def row(key: str, *answers: str, ranks: list[int] | None = None) -> dict[str, Any]:
    return {"answers": list(answers), "ranks": ranks or [*range(len(answers))], "key": key,
            "ratings": [0.0] * len(answers)}  # fmt: skip


def test_layouts_of_published_sets_are_read_with_their_categories(tmp_path: Path) -> None:
    bench = [{"id": i, "prompt": "Why?", "chosen": "So.", "rejected": f"No {i}.", "subset": kind,
              "chosen_model": "m"} for i, kind in enumerate(["hep-go", "donotanswer"])]  # fmt: skip
    found = read_labelled(write(tmp_path / "rewardbench.jsonl", bench))
    assert found.categories == ["hep-go", "donotanswer"]
    assert found.rows[0]["answers"] == ["So.", "No 0."]
    for name in ("Neighbor", "Manual"):
        llmbar = [{"input": "Say 1.", "output_1": "1", "output_2": name, "label": 1},
                  {"input": "Say 2.", "output_1": name, "output_2": "2", "label": 2}]  # fmt: skip
        write(tmp_path / "LLMBar" / name / "dataset.json", llmbar)
    found = read_labelled(str(tmp_path / "LLMBar" / "*" / "dataset.json"))
    assert found.categories == ["Manual"] * 2 + ["Neighbor"] * 2
    assert [each["answers"] for each in found.rows[:2]] == [["1", "Manual"], ["2", "Manual"]]
    panda = [{"idx": i, "instruction": "Add.", "input": "1 2", "response1": "3",
              "response2": "4", **{f"annotator{n + 1}": v for n, v in enumerate(votes)}}
             for i, votes in enumerate([(1, 1, 2), (0, 0, 1), (2, 2, 2)])]  # fmt: skip
    found = read_labelled(write(tmp_path / "panda.json", panda))
    assert [each["answers"] for each in found.rows] == [["3", "4"], ["4", "3"]]
    assert sum(found.left_out.values()) == 1 and "tie" in str(found.left_out)
    alpaca = [{"instruction": "Name one.", "output_1": "ant", "output_2": "bee",
               "preference": p, "generator_2": "m"} for p in (1.0, 2.0, 1.75)]  # fmt: skip
    found = read_labelled(write(tmp_path / "annotations.json", alpaca))
    assert [each["answers"][0] for each in found.rows] == ["ant", "bee", "bee"]
    zero = [{"prompt": "Pick.", "response_a": "x", "response_b": "y", "label": v} for v in (0, 1)]
    file = write(tmp_path / "zero.jsonl", zero)
    found = read_labelled(f"{{path: {file}, verdicts: {{0: second, 1: first}}}}")
    assert [each["answers"][0] for each in found.rows] == ["y", "x"]
    with pytest.raises(ValueError, match=r"--data .*: pth: Extra"):
        read_labelled(f"{{path: {file}, pth: 1}}")


def test_accuracy_ties_and_categories_by_hand() -> None:
    rows = [row("p", "aaaa", "b"), row("p", "a", "bbbb"), row("q", "aa", "bb", "cc")]
    data = Labelled(rows, ["x", "y", "y"], {})
    # Right; wrong; of three pairs 2 > 1 right, 2 > 2 even, 1 > 2 wrong.
    found = measure(data, {"m": [3.0, 1.0, 0.0, 1.0, 2.0, 1.0, 2.0], "n": [1.0, 0.0] * 3 + [0.0]})
    own = found["models"]["m"]
    assert own["accuracy"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert own["ties"] == pytest.approx(1 / 9)
    assert (found["records"], found["pairs"], found["prompts"]) == (3, 5, 2)
    assert own["categories"]["x"] == {**own["categories"]["x"], "value": 1.0, "records": 1}
    assert own["categories"]["y"]["value"] == pytest.approx(0.25)
    # Two prompts of weights 2 and 1: (2 + 1)^2 / (4 + 1) = 1.8, two draws.
    # Wilson around .5: 1.96 sqrt(.25 / 2 + 3.8416 / 16) / (1 + 3.8416 / 2) = .4055.
    assert own["accuracy"]["low"] == pytest.approx(0.5 - 0.4055, abs=1e-4)
    # n: right, right; 1 > 0 right, 1 > 0 right, 0 = 0 even.
    assert found["models"]["n"]["accuracy"]["value"] == pytest.approx((2 + 2.5 / 3) / 3)
    assert found["paired"]["n"]["value"] == pytest.approx((2 + 2.5 / 3) / 3 - 0.5)
    assert any("length-controlled" in line for line in table({"file": "f", **found}))


def test_answers_that_one_model_cannot_read_are_left_out_for_all() -> None:
    rows = [row("p", "a", "b"), row("q", "c", "d")]
    found = measure(Labelled(rows, ["", ""], {}), {"m": [1.0, 0.0, 0.0, 1.0], "n": [1, 0, None, 1]})
    assert (found["records"], found["too_long"]) == (1, 1)
    assert [own["accuracy"]["value"] for own in found["models"].values()] == [1.0, 1.0]
    with pytest.raises(ValueError, match="all 2 records are longer"):
        measure(Labelled(rows, ["", ""], {}), {"m": [None, 0.0, None, 1.0]})


@pytest.mark.parametrize("overconfidence", [1.0, 3.0])
def test_calibration_of_known_error_is_recovered(overconfidence: float) -> None:
    """Scores that claim sigmoid(3 gap) where the truth is sigmoid(gap), for three gaps."""
    rng = np.random.default_rng(0)
    gaps = rng.choice([0.2, 0.8, 1.6], 3000)
    right = rng.random(3000) < 1 / (1 + np.exp(-gaps))
    rows = [row(str(i), "a", "b") for i in range(3000)]
    scores = np.stack([np.where(right, 1, -1) * gaps * overconfidence, np.zeros(3000)], axis=1)
    found = measure(Labelled(rows, [""] * 3000, {}), {"m": scores.ravel().tolist()})
    claimed = [1 / (1 + math.exp(-overconfidence * gap)) for gap in (0.2, 0.8, 1.6)]
    truth = [1 / (1 + math.exp(-gap)) for gap in (0.2, 0.8, 1.6)]
    known = sum(abs(c - t) for c, t in zip(claimed, truth, strict=True)) / 3  # 0 or .153
    calibration = found["models"]["m"]["calibration"]
    assert calibration["error"] == pytest.approx(known, abs=0.02)
    assert calibration["best_scale"] == pytest.approx(1 / overconfidence, rel=0.1)


def test_rewardbench_weighs_subsets_and_averages_sections() -> None:
    kinds = np.array([s for section in SECTIONS.values() for s in section], dtype=object)
    assert len(kinds) == 23
    assert sum(SECTIONS["Reasoning"].values()) == 984 + 6 * 164
    gaps = np.array([-1.0 if kind in ("math-prm", "mt-bench-med") else 1.0 for kind in kinds])
    found = section_scores(gaps, np.ones(23), kinds, np.arange(23))
    assert found["Reasoning"].value == pytest.approx(0.5)
    assert found["Chat"].value == pytest.approx((358 - 40) / 358)
    assert found["Safety"].value == found["Chat Hard"].value == 1.0
    assert found["score"].value == pytest.approx((0.5 + 318 / 358 + 2) / 4)
    part = section_scores(gaps[:5], np.ones(5), kinds[:5], np.arange(5))
    assert list(part) == ["Chat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    made = make_run(tmp_path_factory.mktemp("rewards") / "run", tiny_tokenizer_dir)
    with made.config.open("a") as file:
        file.write("chat: {template: llama2}\n")
    return made


@pytest.mark.slow
def test_an_adapter_and_the_same_model_of_plain_transformers_agree(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    records = [{"prompt": f"Anna paints {i}", "chosen": "a house", "rejected": "hi" + "!" * i,
                "category": "ab"[i % 2]} for i in range(1, 9)]  # fmt: skip
    file = write(tmp_path / "pairs.jsonl", [*records, {**records[0], "rejected": "the " * 400}])
    tokenizer = load_tokenizer(run.backbone)
    tokenizer.chat_template = jinja_template(tokenizer, ChatSection(template="llama2"))
    plain = tmp_path / "plain"
    tokenizer.save_pretrained(plain)
    load: Any = AutoModelForSequenceClassification.from_pretrained
    base = load(run.backbone, num_labels=1, pad_token_id=0)
    merged: Any = PeftModel.from_pretrained(base, str(run.reward_adapter))
    merged.merge_and_unload().save_pretrained(plain)
    monkeypatch.chdir(tmp_path)
    # The first member of the ensemble, and the same in plain transformers and PEFT.
    command = ["eval", str(run.reward_adapter), "--suite", "reward", "--data", file]
    assert cli.main([*command, "--beside", str(plain)]) == 0
    written = run.root / "benchmarks" / "reward" / f"{tmp_path.name}-pairs.json"
    found = json.loads(written.read_text())
    one, other = found["models"].values()
    assert one["accuracy"] == other["accuracy"]
    assert one["length"]["score_correlation"] == pytest.approx(
        other["length"]["score_correlation"], abs=1e-5
    )
    assert one["calibration"]["error"] == pytest.approx(other["calibration"]["error"], abs=1e-5)
    assert (found["records"], found["too_long"]) == (8, 1) and set(one["categories"]) == {*"ab"}
    # A plain model alone; its results are not written into its folder.
    assert cli.main(["eval", str(plain), *command[2:]]) == 0
    assert (tmp_path / "runs/plain/benchmarks/reward" / written.name).is_file()
    capsys.readouterr()
    assert cli.main(["eval", str(run.sft_adapter), *command[2:]]) == 2
    assert "reward model: " in capsys.readouterr().err
    assert cli.main(command[:4]) == 2
    assert "--suite reward needs --data FILE" in capsys.readouterr().err
