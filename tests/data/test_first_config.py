"""`chatllama init`: a config for a model, data and a goal, that loads and trains what was meant."""

import json
import sys
from pathlib import Path

import pytest

from chatllama import cli
from chatllama.config.loader import load_config
from chatllama.config.schema import Config
from data import first_config
from data.checking.first_look import first_look

TALKS = [{"prompt": f"say {i}", "completion": "Anna " * (i % 7 + 1)} for i in range(200)]
PAIRS = [{"prompt": f"say {i}", "chosen": "Anna", "rejected": "me"} for i in range(60)]
PROMPTS = [{"prompt": f"who wrote {i}?"} for i in range(30)]


@pytest.fixture
def work(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file of each kind."""
    (tmp_path / "model").symlink_to(tiny_llama_dir)
    for name, records in (("talks", TALKS), ("pairs", PAIRS), ("prompts", PROMPTS)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*words: str) -> Config:
    command = ["init", "--model", "model", "--gpu-memory", "none", "--out", "c.yaml"]
    assert cli.main([*command, *words]) == 0
    return load_config("c.yaml")


def data(*names: str) -> list[str]:
    return [word for name in names for word in ("--data", f"{name}.jsonl")]


@pytest.mark.parametrize(
    ("goal", "names", "stages"),
    [
        ("sft", ["talks"], {"sft": ["talks"]}),
        ("sft", ["pairs"], {"sft": ["pairs"]}),
        ("ppo", ["talks", "pairs"], {"sft": ["talks"], "reward": ["pairs"], "ppo": ["pairs"]}),
        ("ppo", ["pairs", "prompts"], {"reward": ["pairs"], "ppo": ["prompts"]}),
        ("grpo", ["prompts"], {"ppo": ["prompts"]}),
        ("grpo", ["talks"], {"ppo": ["talks"]}),
        ("grpo", ["talks", "prompts"], {"sft": ["talks"], "ppo": ["prompts"]}),
    ],
)
def test_the_goal_decides_the_stages_and_each_file_goes_where_it_serves(
    work: Path, goal: str, names: list[str], stages: dict[str, list[str]]
) -> None:
    reward = ["--reward", "my_rewards:short"] if goal == "grpo" else []
    cfg = made("--goal", goal, *data(*names), *reward)
    assert list(cfg.stages) == list(stages)
    for stage, files in stages.items():
        section = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}[stage]
        assert [source.path for source in section.data] == [f"{name}.jsonl" for name in files]
        assert all(source.format for source in section.data)
    assert (cfg.run_dir, cfg.backbone.dtype) == (f"runs/model-{goal}", "float32")
    if goal == "grpo":
        assert cfg.ppo.advantage == "grpo" and cfg.ppo.rewards[0].function == "my_rewards:short"


def test_the_config_is_short_commented_and_sized_by_the_data(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = made("--goal", "ppo", *data("talks", "pairs"))
    lines = Path("c.yaml").read_text().splitlines()
    assert len(lines) <= 21 and sum("#" in line for line in lines) >= 6
    # Of 60 pairs, 57 train: 3 epochs of 57 in batches of 4 are 43 steps, the most that there are.
    assert (cfg.reward.batch_size, cfg.reward.epochs) == (4, 3.0)
    assert any("# about 43 steps in all" in line for line in lines)
    assert cfg.reward.max_length == 64  # the longest pair, rounded up
    positions = json.loads((work / "model" / "config.json").read_text())["max_position_embeddings"]
    assert cfg.generation.max_new_tokens == 64  # no record is longer
    assert cfg.ppo.max_prompt_length + cfg.generation.max_new_tokens <= positions
    shown = capsys.readouterr().out
    assert "backbone: {path: model, dtype: float32}  # bfloat16 is slow on a CPU" in lines
    for part in (
        "chat template: llama2; the tokenizer has none of its own",
        "conversations: talks.jsonl (prompt_completion): 200 of 200 records",
        "pairs: pairs.jsonl (preference): 60 of 60 records",
        "[INST] say 0 [/INST] Anna",
        "chatllama data check c.yaml\n  chatllama plan c.yaml\n  chatllama run c.yaml",
    ):
        assert part in shown


def test_pairs_that_the_model_cannot_read_are_not_counted_as_steps(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """400 pairs, of which every tenth fits: 40 in 3 epochs, and not 400 in one."""
    record = {"prompt": "say", "chosen": "good", "rejected": "bad"}
    long = record | {"chosen": "word " * 300}
    lines = "".join(json.dumps(long if n % 10 else record) + "\n" for n in range(400))
    (work / "pairs.jsonl").write_text(lines)
    cfg = made("--goal", "ppo", *data("pairs"))
    assert (cfg.reward.batch_size, cfg.reward.epochs) == (4, 3.0)
    assert cfg.generation.max_new_tokens == 256 - 32
    said = "10% of the records are within, the others are left out"
    assert f"# tokens; {said}" in Path("c.yaml").read_text()
    shown = capsys.readouterr().out
    assert f"warning: reward.max_length 256 tokens; {said}, for the model reads no more" in shown


def test_a_gpu_of_some_memory_gets_what_fits_it(work: Path) -> None:
    (work / "talks.jsonl").write_text((work / "talks.jsonl").read_text() * 10)
    command = ["init", "--model", "model", "--goal", "sft", *data("talks"), "--out", "c.yaml"]
    assert cli.main([*command, "--gpu-memory", "24GB"]) == 0
    cfg = load_config("c.yaml")
    assert cfg.backbone.dtype == "bfloat16" and cfg.sft.microbatch_size == cfg.sft.batch_size >= 16
    assert "# for this GPU" in Path("c.yaml").read_text()
    Path("c.yaml").unlink()
    assert cli.main([*command, "--gpu-memory", "1MB"]) == 2
    assert not Path("c.yaml").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--goal", "sft", *data("prompts")], "--goal sft needs a file with answers"),
        (["--goal", "ppo", *data("talks")], "--goal ppo needs a file of pairs"),
        (["--goal", "grpo", *data("prompts")], "--reward is missing, and there is no terminal"),
        (["--goal", "sft"], "--data is missing"),
        (data("talks"), "--goal is missing"),
        (["--goal", "sft", *data("tlks")], "did you mean talks.jsonl"),
    ],
)
def test_what_does_not_fit_or_is_missing(
    work: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    command = ["init", "--model", "model", "--gpu-memory", "none", "--out", "c.yaml"]
    assert cli.main([*command, *words]) == 2
    assert expected in capsys.readouterr().err
    assert not Path("c.yaml").exists()
    Path("c.yaml").write_text("mine")
    assert cli.main([*command, "--goal", "sft", *data("talks")]) == 2
    assert Path("c.yaml").read_text() == "mine"


def test_what_is_not_given_is_asked_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["model", "talks.jsonl pairs.jsonl", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    out = first_config.init(first_config.Wishes(), None)
    assert out == Path("model-ppo.yaml")  # there are pairs
    assert load_config(out).stages == ("sft", "reward", "ppo")


@pytest.mark.parametrize(
    ("text", "expected"), [("", "there is no record in it"), ('{"a": 1}\n', "no format for")]
)
def test_files_that_cannot_be_used(work: Path, text: str, expected: str) -> None:
    (work / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=expected):
        first_look("x.jsonl")
