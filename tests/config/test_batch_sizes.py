import math
from pathlib import Path

import pytest

from chatllama.config.batch_sizes import (
    check_batches,
    lr_factor,
    microbatches_per_step,
    optimizer_steps,
    policy_steps,
    ppo_lr_factors,
    ppo_optimizer_steps,
)
from chatllama.config.loader import ConfigError, load_config
from chatllama.config.model import BackboneSection, FromScratch
from chatllama.config.schema import Config, PpoSection, SftSection
from chatllama.config.sources import DataSource as Source

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_microbatches_divide_over_ranks() -> None:
    section = SftSection(batch_size=48, microbatch_size=4)
    # 48 examples in forward passes of 4 on each of 1, 3, 12 ranks.
    assert [microbatches_per_step(section, ranks, "sft") for ranks in (1, 3, 12)] == [12, 4, 1]


def test_uneven_batch_names_keys_values_and_remedies() -> None:
    section = SftSection(batch_size=48, microbatch_size=12)
    with pytest.raises(ValueError) as caught:
        microbatches_per_step(section, 3, "sft")
    # 12 * 3 = 36: 36 and 72 are its multiples around 48; 16 per rank has the divisors 8 and 16.
    assert str(caught.value) == (
        "sft.batch_size 48 is not a multiple of sft.microbatch_size 12 times 3 ranks (= 36); "
        "nearest that work: sft.batch_size 36 or 72, or sft.microbatch_size 8 or 16"
    )


def test_batch_smaller_than_the_ranks_is_never_advised_to_be_zero() -> None:
    section = SftSection(batch_size=4, microbatch_size=1)
    with pytest.raises(ValueError) as caught:
        microbatches_per_step(section, 8, "sft")
    assert str(caught.value).endswith("(= 8); nearest that work: sft.batch_size 8")


@pytest.mark.parametrize(
    ("epochs", "num_examples", "steps"),
    [(1.0, 100, 13), (2.0, 100, 25), (0.5, 100, 7), (1.0, 96, 12), (1.0, 3, 1)],
)
def test_optimizer_steps_from_epochs(epochs: float, num_examples: int, steps: int) -> None:
    # Batches of 8: 100 examples are 12 full batches and a filled one.
    section = SftSection(epochs=epochs, batch_size=8)
    assert optimizer_steps(section, num_examples) == steps


def test_given_steps_win_and_no_examples_are_refused() -> None:
    section = SftSection(steps=5, epochs=3.0)
    assert optimizer_steps(section, 1000) == 5
    with pytest.raises(ValueError, match="0 training examples"):
        optimizer_steps(section, 0)


def test_ppo_batches_on_two_ranks() -> None:
    section = PpoSection(
        steps=10, epochs=3, rollout_batch_size=96, minibatch_size=24, microbatch_size=4
    )
    # 24 responses are 2 ranks' 3 forward passes of 4; 10 steps * 3 epochs * 96 / 24 minibatches.
    assert microbatches_per_step(section, 2, "ppo") == 3
    assert ppo_optimizer_steps(section) == 120


def test_check_batches_reports_all_stages_at_once() -> None:
    text = FromScratch(data=[Source(path="a.txt")], batch_size=30, microbatch_size=10)
    cfg = Config(
        run_dir="r",
        backbone=BackboneSection(from_scratch=text),
        sft=SftSection(data=text.data, batch_size=8, microbatch_size=8),
        ppo=PpoSection(
            data=text.data, rollout_batch_size=64, minibatch_size=32, microbatch_size=16
        ),
    )
    check_batches(cfg, 1)
    with pytest.raises(ConfigError) as caught:
        check_batches(cfg, 4)
    message = str(caught.value)
    assert message.startswith("batch sizes on 4 ranks: 3 problems\n")
    for key in ("backbone.from_scratch.batch_size 30", "sft.batch_size 8", "ppo.minibatch_size 32"):
        assert key in message
    assert "reward" not in message  # 64 = 8 * 4 ranks * 2


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("quickstart.yaml", 1),
        ("quickstart.yaml", 2),
        ("reference.yaml", 1),
        ("llama-7b-24gb.yaml", 1),
        ("llama-7b-nf4-12gb.yaml", 1),
        ("llama-13b-8gpu-zero2.yaml", 8),
        ("llama-70b-multinode-zero3.yaml", 32),
    ],
)
def test_configs_divide_on_the_machines_they_are_for(name: str, world_size: int) -> None:
    check_batches(load_config(CONFIGS / name), world_size)


def test_linear_schedule() -> None:
    # Warm-up 1/2, 1, then from 1 down by 1/4 a step; 0 one step after the last.
    factors = [lr_factor(step, 6, "linear", 2) for step in range(8)]
    assert factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_cosine_schedule_ends_at_a_tenth() -> None:
    factors = [lr_factor(step, 4, "cosine") for step in range(6)]
    half = 0.45 * math.sqrt(0.5)
    assert factors == pytest.approx([1.0, 0.55 + half, 0.55, 0.55 - half, 0.1, 0.1])


def test_constant_schedule_and_warmup_longer_than_the_run() -> None:
    assert [lr_factor(step, 3, "constant", 1) for step in range(4)] == [1.0] * 4
    assert [lr_factor(step, 2, "linear", 4) for step in range(3)] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("rests", [0, 1, 3])
def test_the_policys_schedule_begins_after_critic_warm_up(rests: int):
    # Two optimizer steps a PPO step; of 5 steps the policy makes 5 - rests.
    section = PpoSection(
        steps=5, rollout_batch_size=8, minibatch_size=4, microbatch_size=4, epochs=1,
        warmup_steps=2, critic_warmup_steps=rests,
    )  # fmt: skip
    own = 10 - 2 * rests
    assert [policy_steps(section, n) for n in (0, rests, 5)] == [0, 0, own]
    for done in range(10):
        factors = ppo_lr_factors(section, done)
        assert (
            factors["value"]
            == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8][done]
        )
        assert ("policy" in factors) == (done >= 2 * rests)
        if done >= 2 * rests:
            since = done - 2 * rests
            decay = 1 - (since - 2) / (own - 2)
            assert factors["policy"] == ([0.5, 1.0][since] if since < 2 else decay)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_critic_there_is_one_schedule(advantage: str):
    section = PpoSection.model_validate({"advantage": advantage, "samples_per_prompt": 2})
    assert ppo_lr_factors(section, 0) == {"policy": 1.0}
