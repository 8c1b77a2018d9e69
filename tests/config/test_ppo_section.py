"""The section `ppo`: defaults that depend on other keys, and combinations that are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from chatllama.config.loader import load_config
from chatllama.config.ppo import PpoSection

GRPO = {"advantage": "grpo", "samples_per_prompt": 4}


def kl_of(section: PpoSection) -> tuple[float, float, str]:
    return section.kl_coef, section.kl_loss_coef, section.kl_loss_estimator


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.05, 0.0, "k2")),
        ({"advantage": "rloo", "samples_per_prompt": 2}, (0.05, 0.0, "k2")),
        (GRPO, (0.0, 0.02, "k3")),
        ({**GRPO, "kl_coef": 0.3}, (0.3, 0.0, "k3")),
        ({**GRPO, "kl_coef": 0.0}, (0.0, 0.02, "k3")),
        ({**GRPO, "kl_loss_coef": 0.0}, (0.0, 0.0, "k3")),
        ({**GRPO, "kl_coef": 0.3, "kl_loss_coef": 0.1}, (0.3, 0.1, "k3")),
        ({**GRPO, "kl_loss_estimator": "k2"}, (0.0, 0.02, "k2")),
    ],
    ids=str,
)
def test_the_kl_of_grpo_is_in_the_loss_unless_it_is_given_elsewhere(
    given: dict[str, Any], expected: tuple[float, float, str]
):
    section = PpoSection.model_validate(given)
    assert kl_of(section) == expected
    assert kl_of(PpoSection.model_validate(section.model_dump())) == expected


def test_the_defaults_of_grpo_are_those_of_a_file_and_of_the_command_line(tmp_path: Any):
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: r\nbackbone: {path: b}\nppo: {samples_per_prompt: 4}\n")
    assert kl_of(load_config(str(file), ["ppo.advantage=grpo"]).ppo) == (0.0, 0.02, "k3")
    both = ["ppo.advantage=grpo", "ppo.kl_coef=0.1"]
    assert kl_of(load_config(str(file), both).ppo) == (0.1, 0.0, "k3")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**GRPO, "whiten_rewards": True}, "whiten_rewards: grpo divides the scores"),
        ({**GRPO, "kl_controller": "adaptive"}, "adaptive multiplies kl_coef"),
        ({"kl_controller": "adaptive", "kl_coef": 0.0}, "adaptive multiplies kl_coef"),
        ({**GRPO, "critic_lam": 1.0}, "critic_lam needs a critic; grpo has none"),
        ({**GRPO, "critic_lam": 0.0}, "critic_lam needs a critic; grpo has none"),
        ({"advantage": "rloo", "samples_per_prompt": 2, "critic_lam": 0.5}, "needs a critic; rloo"),
        ({**GRPO, "critic_warmup_steps": 1}, "critic_warmup_steps needs a critic"),
        *(
            ({"steps": steps, "critic_warmup_steps": rests}, "would never be trained; give fewer")
            for steps, rests in ((1, 1), (3, 3), (3, 200))
        ),
        ({"critic_lam": 1.1}, "less than or equal to 1"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        PpoSection.model_validate(given)
