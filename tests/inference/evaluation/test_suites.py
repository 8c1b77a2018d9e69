"""Suites: local records, pooled errors, and lm-eval's own figures on the same items."""

import json
from pathlib import Path
from typing import Any

import pytest
from generation_runs import make_run

from chatllama import cli
from chatllama.inference.evaluation.command import pooled
from chatllama.inference.evaluation.suites import SUITES, find_suite, local_records
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import append_lines


def test_records_of_mmlu_and_hellaswag_have_the_hubs_columns(testdata: Path) -> None:
    mmlu = local_records("mmlu_anatomy", testdata / "mmlu")()
    assert len(mmlu["dev"]) == 5
    first = mmlu["dev"][0]
    assert first["question"] == "What is the embryological origin of the hyoid bone?"
    assert first["choices"][first["answer"]] == "The second and third pharyngeal arches"
    hellaswag = local_records("hellaswag", testdata / "hellaswag")()["validation"]
    assert len(hellaswag) == 1000
    assert hellaswag[0]["ctx_a"] == "A man is sitting on a roof."
    assert hellaswag[0]["ctx_b"] == "he"


def test_any_task_can_have_files_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    records = [{"question": "q", "passage": "p", "label": 1}]
    append_lines(tmp_path / "boolq" / "validation.jsonl", records)
    assert local_records("boolq", tmp_path)()["validation"].to_list() == records
    with pytest.raises(ValueError, match="no records of piqa there"):
        local_records("piqa", tmp_path)


@pytest.mark.parametrize("line", ["q,a,b,c,A", "q,a,b,c,d,E", "q,a,b,c,d,"])
def test_a_broken_line_of_mmlu_is_named(tmp_path: Path, line: str) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_text(f"q,a,b,c,d,A\n{line}\n")
    with pytest.raises(ValueError, match=r"anatomy_dev.csv:2: expected question, four choices"):
        local_records("mmlu_anatomy", tmp_path)()


def test_published_rows_are_shown_for_their_own_number_of_examples_only() -> None:
    assert find_suite("mmlu", None).published["LLaMA 7B"]["average"] == 35.1
    assert find_suite("mmlu", 5).published["LLaMA-I 65B"] == {"average": 68.9}
    assert not find_suite("mmlu", 0).published
    assert find_suite("arc_easy, piqa", None).tasks == ("arc_easy", "piqa")
    eight = SUITES["commonsense"]
    assert all(set(row) == set(eight.tasks) for row in eight.published.values())


def test_a_group_is_the_mean_over_items_with_its_pooled_error() -> None:
    results = {
        "a": {"acc": 0.5, "acc_stderr": 0.1, "items": 20},
        "b": {"acc": 0.8, "acc_stderr": 0.2, "items": 5},
    }
    # (10 + 4) / 25; variance (19 * .01 * 20 + 4 * .04 * 5) / 23 = .2, over 25 items.
    assert pooled(results, ["a", "b"], "acc") == pytest.approx((0.56, (0.2 / 25) ** 0.5))
    assert pooled(results, ["a", "b"], "f1") is None


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path, testdata: Path
) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("suites") / "run", tiny_tokenizer_dir)


def reference(
    model: Path, adapter: Path | None, task: str, folder: Path, shots: int, limit: int
) -> dict[str, Any]:
    """What lm-eval's own `hf` model, on files alone, finds."""
    from lm_eval.evaluator import simple_evaluate

    from chatllama.inference.evaluation.harness import task_manager

    peft = {"peft": str(adapter)} if adapter else {}
    spec = {"group": "g", "task": [{"task": task, "custom_dataset": local_records(task, folder)}]}
    found = simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32", **peft},
        tasks=[spec], num_fewshot=shots, limit=limit, batch_size=4, device="cpu", log_samples=False,
        task_manager=task_manager(),
    )  # fmt: skip
    assert found and "results" in found
    return dict(found["results"][task])


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], task: str) -> None:
    for name in ("acc", "acc_norm") if task == "hellaswag" else ("acc",):
        assert ours[name] == theirs[f"{name},none"]
        assert ours[f"{name}_stderr"] == theirs[f"{name}_stderr,none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data", "shots"), [("hellaswag", "hellaswag", 0), ("mmlu_anatomy", "mmlu", 1)]
)
def test_figures_are_those_of_lm_evals_own_model(
    run: RunFolder, testdata: Path, task: str, data: str, shots: int
) -> None:
    words = ["--suite", task, "--shots", str(shots), "--data", str(testdata / data)]
    assert cli.main(["eval", str(run.root), *words, "--limit", "20", "--batch-size", "4"]) == 0
    seen: set[float] = set()
    adapters = {"base": None, "sft": run.sft_adapter, "policy": run.policy_adapter}
    for role, adapter in adapters.items():
        path = run.root / "benchmarks" / task / f"{role}.json"
        ours = json.loads(path.read_text())["tasks"][task]
        theirs = reference(run.backbone, adapter, task, testdata / data, shots, 20)
        assert_equal(ours, theirs, task)
        seen |= {value for name, value in ours.items() if name in ("acc", "acc_norm")}
        assert ours["items"] == 20
    assert len(seen) > 1  # roles differ, or the comparison would prove little


@pytest.mark.slow
def test_a_trained_models_figures_are_those_of_lm_eval(
    testdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HellaSwag, and three subjects of MMLU, whose five examples do not fit its 512 positions."""
    monkeypatch.chdir(tmp_path)
    model = testdata / "stories260k" / "hf"
    subjects = [f"mmlu_{name}" for name in ("anatomy", "astronomy", "abstract_algebra")]
    for suite, data, shots in (("hellaswag", "hellaswag", 0), (",".join(subjects), "mmlu", 5)):
        words = ["--suite", suite, "--shots", str(shots), "--data", str(testdata / data)]
        assert cli.main(["eval", str(model), *words, "--limit", "8", "--batch-size", "4"]) == 0
        path = tmp_path / "runs/hf/benchmarks" / suite.replace(",", "+") / "base.json"
        for task, ours in json.loads(path.read_text())["tasks"].items():
            assert_equal(ours, reference(model, None, task, testdata / data, shots, 8), task)
            assert ours["items"] == 8 and (shots == 0 or ours["truncated"] > 0)


@pytest.mark.slow
def test_what_was_measured_is_kept_under_equal_settings(
    run: RunFolder, testdata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(run.root), "--suite", "hellaswag", "--role", "sft", "--data"]
    words += [str(testdata / "hellaswag"), "--limit"]
    assert cli.main([*words, "2"]) == 0
    assert "sft: hellaswag (1 of 1)" in capsys.readouterr().err
    assert cli.main([*words, "2"]) == 0
    again = capsys.readouterr()
    assert again.err == "" and "acc_norm (%)" in again.out
    assert cli.main([*words, "3"]) == 0
    assert "measured under other settings; done again" in capsys.readouterr().err
    assert cli.main(["eval", str(run.root), "--suite", "hellaswaag"]) == 2
    assert "near are hellaswag" in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_goes_on_where_it_was_interrupted(
    run: RunFolder, testdata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatllama.inference.evaluation.harness import RoleLM

    words = ["eval", str(run.root), "--suite", "hellaswag", "--role", "base", "--limit", "6"]
    words += ["--data", str(testdata / "hellaswag"), "--batch-size", "2"]
    assert cli.main(words) == 0
    folder = run.root / "benchmarks" / "hellaswag"
    whole = (folder / "base.json").read_text()
    (folder / "base.json").unlink()
    calls: list[int] = []
    model_call = RoleLM._model_call

    def counted(self: Any, inputs: Any, **more: Any) -> Any:
        calls.append(len(inputs))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return model_call(self, inputs, **more)

    monkeypatch.setattr(RoleLM, "_model_call", counted)
    assert cli.main(words) == 130
    (partial,) = folder.glob("base.hellaswag.*.jsonl")
    assert len(partial.read_text().splitlines()) == 8
    assert cli.main(words) == 0
    assert sum(calls[5:]) == 24 - 8  # six items have four endings each
    assert (folder / "base.json").read_text() == whole and not partial.exists()


@pytest.mark.slow
def test_written_answers_follow_the_chat_contract(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IFEval: the prompt is one message of the user, answered greedily, judged by lm-eval."""
    from chatllama.inference.answerer import Answerer

    asked: list[Any] = []
    answer = Answerer.answer

    def spy(self: Answerer, conversations: Any, *rest: Any) -> Any:
        asked.extend(conversations)
        return answer(self, conversations, *rest)

    monkeypatch.setattr(Answerer, "answer", spy)
    (tmp_path / "ifeval").mkdir()
    record = {
        "key": 1, "prompt": "Anna paints", "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }  # fmt: skip
    append_lines(tmp_path / "ifeval" / "train.jsonl", [record])
    words = ["eval", str(run.root), "--suite", "ifeval", "--role", "policy"]
    assert cli.main([*words, "--data", str(tmp_path)]) == 0
    assert asked == [[{"role": "user", "content": "Anna paints"}]]
    found = json.loads((run.root / "benchmarks" / "ifeval" / "policy.json").read_text())
    assert found["tasks"]["ifeval"]["prompt_level_strict_acc"] in (0.0, 1.0)
