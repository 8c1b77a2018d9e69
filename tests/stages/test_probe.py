"""Rates from three steps of every stage: what is launched, and what is made of its metrics."""

import json
from pathlib import Path

import pytest

from chatllama import cli
from chatllama.config.loader import load_config
from chatllama.runs.folder import STAGES, RunFolder
from trainers.stages import probe
from trainers.stages.launcher import Launch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list:
    seen: list = []

    def run_pipeline(config: str, overrides: list[str], *, launch: Launch) -> None:
        cfg = load_config(config, overrides)
        seen.append((cfg, launch))
        run = RunFolder(Path(cfg.run_dir))
        for number, stage in enumerate(STAGES, start=1):
            run.stage(stage).mkdir(parents=True)
            # Two steps after the first take 2, 4 and 6 s; the evaluation at the end does not count.
            lines = [(1, 5.0), (2, 5.0 + number), (3, 5.0 + 2 * number), (3, 99.0)]
            text = "".join(json.dumps({"step": s, "time": t}) + "\n" for s, t in lines)
            run.metrics(stage).write_text(text)

    monkeypatch.setattr(probe, "run_pipeline", run_pipeline)
    return seen


@pytest.mark.parametrize(
    "name", ["quickstart", "llama-7b-24gb", "llama-13b-8gpu-zero2", "llama-70b-multinode-zero3"]
)
def test_three_steps_of_each_stage_in_a_folder_of_their_own(name: str, launched: list) -> None:
    config = str(CONFIGS / f"{name}.yaml")
    longer = [] if "advantage" in Path(config).read_text() else ["ppo.critic_warmup_steps=5"]
    rates = probe.probe_rates(config, ["seed=3", *longer], 2)
    ((cfg, launch),) = launched
    own = load_config(config)
    assert launch == Launch(num_gpus=2) and cfg.seed == 3
    assert {cfg.sft.steps, cfg.reward.steps, cfg.ppo.steps} == {3}
    assert cfg.run_dir != own.run_dir and not Path(cfg.run_dir).exists()
    assert cfg.sft.microbatch_size == own.sft.microbatch_size
    # tokens of two steps at full length, over their seconds
    assert rates["sft"] == own.sft.batch_size * own.sft.max_length * 2 / 2
    assert rates["reward"] == 2 * own.reward.batch_size * own.reward.max_length * 2 / 4
    length = own.ppo.max_prompt_length + own.generation.max_new_tokens
    assert rates["ppo"] == own.ppo.rollout_batch_size * length * 2 / 6


def test_the_plan_says_that_it_measured(launched: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "llama-7b-24gb.yaml"), "--probe", "sft.steps=6"]) == 0
    text = capsys.readouterr().out
    assert "(three steps, just measured here)" in text
    # 6 steps at a step a second
    assert "  6 s at 65,536 tokens per second" in text


@pytest.mark.slow
def test_the_demo_is_probed(capsys: pytest.CaptureFixture[str]) -> None:
    rates = probe.probe_rates(str(CONFIGS / "quickstart.yaml"), [], 1)
    assert {*rates} == {*STAGES} and all(rate > 0 for rate in rates.values())
