"""Everything that can be refused is refused before a process is launched, in one list."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_models import tiny_llama

from chatllama import cli
from chatllama.config.errors import ConfigError
from chatllama.config.schema import Config
from trainers.stages import pipeline, refusals
from trainers.stages.launcher import Launch
from trainers.stages.pipeline import run_pipeline


@pytest.fixture
def work(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model of 256 positions and data; nothing may be launched."""
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    change_config(tmp_path / "model", max_position_embeddings=256)
    record = {"prompt": "a", "completion": "b"}
    (tmp_path / "notes.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "count_gpus", lambda: 0)

    def launched(*_: object) -> int:
        raise AssertionError("launched")

    monkeypatch.setattr(pipeline, "run_to_end", launched)
    return tmp_path


def change_config(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


GOOD: dict[str, Any] = {
    "run_dir": "run",
    "backbone": {"path": "model", "dtype": "float32"},
    "sft": {"data": [{"path": "notes.jsonl"}]},
    "ppo": {
        "data": [{"path": "notes.jsonl"}],
        "max_prompt_length": 64,
        "rewards": [{"function": "operator:eq"}],
    },
    "generation": {"max_new_tokens": 64},
}


def problems(*overrides: str) -> tuple[str, ...]:
    Path("c.yaml").write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError) as caught:
        run_pipeline("c.yaml", overrides)
    return caught.value.problems


def test_what_is_right_is_launched(work: Path) -> None:
    (work / "c.yaml").write_text(json.dumps(GOOD))
    with pytest.raises(AssertionError, match="launched"):
        run_pipeline("c.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("backbone.path=modle", "backbone.path: no model at 'modle'"),
        ("backbone.path=modle", "did you mean model?"),
        ("backbone.path=./models/llama", "safetensors) or a hub id"),
        ("sft.data=[{path: ntes.jsonl}]", "sft.data.0.path: no data file 'ntes.jsonl'"),
        ("sft.data=[{path: ntes.jsonl}]", "did you mean notes.jsonl?"),
        ("sft.eval_data=[{path: 'a*.jsonl'}]", "sft.eval_data.0.path: no file matches 'a*.jsonl'"),
        ("ppo.ptx_data=[{path: none.txt, format: text}]", "ppo.ptx_data.0.path: no data file"),
        ("sft.max_length=257", "sft.max_length 257: the model reads 256 tokens"),
        ("generation.max_new_tokens=200", "64 + generation.max_new_tokens 200 are 264 tokens"),
        ("ppo.rewards=[{function: 'no_such:f'}]", "ppo.rewards.0.function: 'no_such:f' is not"),
        ("evaluation.gold='operator:none'", "evaluation.gold: 'operator:none' is not"),
        ("ppo.rewards=[{adapter: run}]", "which has none: give reward.data"),
        ("tracking.report_to=[tensorbord]", "tracking.report_to: 'tensorbord' is none of"),
    ],
)
def test_each_mistake_is_named(work: Path, override: str, expected: str) -> None:
    found = problems(override, *(["ppo.ptx_coef=0.1"] if "ptx" in override else []))
    assert any(expected in each for each in found), found
    assert len(found) == 1


def test_batches_that_do_not_divide_are_in_the_list(work: Path) -> None:
    (work / "c.yaml").write_text(json.dumps(GOOD))
    wrong = ["sft.batch_size=9", "sft.microbatch_size=9", "ppo.data=[{path: x.jsonl}]"]
    with pytest.raises(ConfigError) as caught:
        run_pipeline("c.yaml", wrong, launch=Launch(num_gpus=2))
    found = [each.split()[0] for each in caught.value.problems]
    assert found == ["ppo.data.0.path:", "sft.batch_size"]


def test_packages_and_gpus_that_are_missing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    flash = ["backbone.attn_implementation=flash_attention_2", "backbone.dtype=bfloat16"]
    found = problems(*flash, "backbone.quantization=nf4", "tracking.report_to=[wandb]")
    for part in ("needs the package flash-attn", "chatllama[bitsandbytes]", "chatllama[wandb]"):
        assert any(part in each for each in found)


def test_flash_attention_for_a_model_made_from_text_is_a_message(work: Path) -> None:
    scratch = "{from_scratch: {data: [{path: a.txt}]}, attn_implementation: flash_attention_2}"
    found = problems(f"backbone={scratch}")
    assert refusals.FLASH_WITHOUT_MODEL in found
    assert any(each.startswith("backbone.from_scratch.data.0.path: no data file") for each in found)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "gemma2", "architectures": None}, "a 'gemma2' model, not one of"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised by gptq"),
        ({"hidden_size": 8, "intermediate_size": 99}, "backbone.path"),
    ],
)
def test_models_that_cannot_be_trained(work: Path, change: dict[str, Any], expected: str) -> None:
    change_config(work / "model", **change)
    (found,) = problems()
    assert expected in found


def test_all_mistakes_come_in_one_list_and_a_finished_stage_is_not_asked(work: Path) -> None:
    wrong = ["backbone.path=modle", "sft.data=[{path: x.jsonl}]", "ppo.data=[{path: y.jsonl}]"]
    assert [each.split(".")[0] for each in problems(*wrong)] == ["backbone", "sft", "ppo"]
    (work / "run" / "sft").mkdir(parents=True)
    (work / "run" / "sft" / "result.json").write_text("{}")
    assert [each.split(".")[0] for each in problems(*wrong)] == ["backbone", "ppo"]


def test_a_default_length_is_lowered_and_not_refused(work: Path) -> None:
    """Defaults go beyond this model; run folders hold them as if they had been given."""
    ppo = {key: value for key, value in GOOD["ppo"].items() if key != "max_prompt_length"}
    (work / "c.yaml").write_text(json.dumps(GOOD | {"ppo": ppo}))
    for config in ("c.yaml", "run/config.yaml"):
        with pytest.raises(AssertionError, match="launched"):
            run_pipeline(config)


def test_answers_as_long_as_the_model_reads_leave_no_prompt(work: Path) -> None:
    (found,) = problems("generation.max_new_tokens=256")
    assert "are 320 tokens, and the model reads 256" in found
    (work / "run").mkdir()
    (work / "run" / "config.yaml").write_text(json.dumps(GOOD | {"run_dir": str(work / "run")}))
    with pytest.raises(ConfigError, match="the model reads 256"):
        run_pipeline("run/config.yaml", ["generation.max_new_tokens=256"])


def test_a_data_set_that_the_hub_does_not_have(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        error: Exception = ConnectionError("no network")

        def dataset_info(self, name: str, timeout: float) -> None:
            assert (name, timeout) == ("somebody/notes", refusals.HUB_SECONDS)
            raise self.error

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (work / "c.yaml").write_text(json.dumps(GOOD))
    with pytest.raises(AssertionError, match="launched"):  # the cache may have it
        run_pipeline("c.yaml", ["sft.data=[{path: somebody/notes}]"])

    request = httpx2.Request("GET", "http://127.0.0.1")
    Hub.error = RepositoryNotFoundError("404", response=httpx2.Response(404, request=request))
    (found,) = problems("sft.data=[{path: somebody/notes}]")
    assert found.startswith("sft.data.0.path: no file 'somebody/notes' here, and no data set")


def test_the_command_prints_the_list_with_code_2(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "c.yaml").write_text(json.dumps(GOOD))
    assert cli.main(["run", "c.yaml", "sft.data=[{path: x.jsonl}]", "sft.max_length=999"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("chatllama: c.yaml: 2 problems\n  - sft.data.0.path")


def test_a_sliding_window_limits_no_length(tmp_path: Path) -> None:
    tiny_llama(form="mistral, window").save_pretrained(tmp_path)
    cfg = Config.model_validate(
        {"run_dir": "r", "backbone": {"path": str(tmp_path), "dtype": "float32"}}
    )
    assert refusals._backbone_problems(cfg) == ([], 256)


def test_what_is_missing_is_refused_without_torch(work: Path) -> None:
    """A second, not the twenty that torch and transformers can take on a busy machine."""
    change_config(work / "model", model_type="gemma2")
    (work / "c.yaml").write_text(json.dumps(GOOD))
    wrong = ["sft.data=[{path: x.jsonl}]", "sft.batch_size=9", "sft.microbatch_size=9"]
    words = ["run", "c.yaml", *wrong, "--num-gpus", "2"]
    code = (
        f"import sys; from chatllama import cli; assert cli.main({words!r}) == 2;"
        "print(*{'torch', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
    for part in ("3 problems", "a 'gemma2' model", "x.jsonl", "sft.batch_size 9"):
        assert part in done.stderr
