"""What a stage says before it trains: its work, and what is likely a mistake, with a remedy."""

from typing import Any

import pytest

from chatllama.config.batch_sizes import optimizer_steps, ppo_optimizer_steps
from chatllama.config.schema import Config
from chatllama.runs.folder import Stage
from trainers.stages import forecast


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({"run_dir": "r", "backbone": {"path": "b"}, **sections})


def said(capsys: pytest.CaptureFixture[str], cfg: Config, stage: Stage, **given: Any) -> list[str]:
    usual: dict[str, Any] = {
        "records": 1000,
        "over": 0,
        "limit": "128 tokens (KEY)",
        "advice": "ADVICE",
        "examples": 1000,
        "tokens": 1e6,
    }
    forecast.announce(cfg, stage, **{**usual, "steps": 500, **given})
    out, err = capsys.readouterr()
    return [out.strip(), *err.strip().splitlines()]


def test_records_passes_steps_and_tokens_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(sft={"batch_size": 8, "microbatch_size": 4}, ppo={"rollout_batch_size": 64})
    assert said(capsys, cfg, "sft", over=12, examples=400, steps=125, tokens=123456.7) == [
        "sft: 1,000 records (12 longer than the limit), 400 examples, 2.5 times over in 125 steps "
        "of 8: 125 optimizer steps, about 123,457 tokens"
    ]
    each = ppo_optimizer_steps(cfg.ppo) // cfg.ppo.steps
    (line,) = said(capsys, cfg, "ppo", steps=cfg.ppo.steps)
    assert f"1,000 prompts, {cfg.ppo.steps * 64 / 1000:.3g} times over" in line
    assert f": {each * cfg.ppo.steps:,} optimizer steps" in line


@pytest.mark.parametrize(
    ("stage", "section", "examples", "remedy"),
    [
        # 2 x 1,000 examples make 50 steps of 40
        ("sft", {"batch_size": 64, "microbatch_size": 4, "epochs": 2.0}, 1000, "batch_size=40"),
        # ... of 39, were it not for microbatches of 4
        ("reward", {"batch_size": 64, "microbatch_size": 4}, 1990, "batch_size=36"),
        ("sft", {"batch_size": 64, "microbatch_size": 4, "epochs": 2.0}, 90, "epochs=36"),
        ("reward", {"batch_size": 8, "steps": 20}, 1000, "steps=50"),
        # 4 epochs x 1 minibatch a step
        ("ppo", {"rollout_batch_size": 64, "minibatch_size": 64, "steps": 10}, 9, "steps=13"),
    ],
)
def test_few_steps_name_the_key_that_makes_more(
    stage: Stage,
    section: dict[str, Any],
    examples: int,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = config(**{stage: section})

    def steps_of(cfg: Config) -> int:
        if stage == "ppo":
            return cfg.ppo.steps
        return optimizer_steps(cfg.sft if stage == "sft" else cfg.reward, examples)

    _, warning = said(capsys, cfg, stage, examples=examples, steps=steps_of(cfg))
    assert warning.startswith(f"warning: {stage}: ") and f"; {stage}.{remedy} makes 50" in warning
    key, _, value = remedy.partition("=")
    better = config(**{stage: section | {key: float(value) if key == "epochs" else int(value)}})
    assert len(said(capsys, better, stage, examples=examples, steps=steps_of(better))) == 1


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_many_lost_records_name_the_limit(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(said(capsys, config(), stage, over=200)) == 1
    _, warning = said(capsys, config(), stage, over=201)
    assert f"201 of 1,000 records of {stage} are longer than the limit of 128 tokens" in warning
    assert warning.endswith("(KEY) and are cut or left out; ADVICE")


def test_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "rank", lambda: 1)
    assert said(capsys, config(), "sft", over=900, steps=1) == [""]
