"""What PPO asks of a finished reward stage: where its models are, and whether they may be used."""

from pathlib import Path

from chatllama.config import RewardSection
from chatllama.results import BAYES_SLACK
from chatllama.run_folder import RunFolder


def doctor_path(run: RunFolder) -> Path:
    """What the RM doctor found, in data and model."""
    return run.stage("reward") / "doctor.json"


def member_folder(run: RunFolder, member: int) -> Path:
    """PEFT folder of member 0, 1, ... of the ensemble; member 0 is RUN/reward/adapter."""
    folder = run.reward_adapter
    return folder if member == 0 else folder.with_name(f"{folder.name}-{member}")


def reward_folders(run: RunFolder) -> list[Path]:
    """The adapters of a finished reward stage: one, or those of the whole ensemble.

    Raises:
        ValueError: the stage has not finished, or one of them is missing.
    """
    count = int(run.read_result("reward").get("ensemble", 1))
    folders = [member_folder(run, member) for member in range(count)]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: the reward stage of {run.root} trained {count}")
    return folders


def check_gate(run: RunFolder, section: RewardSection) -> list[str]:
    """Warnings about the reward model that PPO is to climb; empty if there are none.

    Raises:
        ValueError: on held-out pairs it cannot be told from guessing, and
            `reward.allow_weak` is not set.
    """
    numbers = run.read_result("reward")
    accuracy, low, high = (numbers[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
    warnings = []
    if low <= 0.5:
        text = (
            f"the reward model orders {accuracy:.1%} of the held-out pairs as the labels do (95 % "
            f"interval {low:.1%} to {high:.1%}, {int(numbers['num_eval_pairs'])} pairs): that "
            "cannot be told from guessing, and PPO would climb noise"
        )
        if not section.allow_weak:
            raise ValueError(
                f"{text}. See {doctor_path(run)}. Remedies: more or cleaner "
                "pairs, more held-out pairs, reward.epochs, reward.learning_rate, lora.r; or "
                "reward.allow_weak=true to start all the same"
            )
        warnings.append(text)
    limit = numbers.get("bayes_accuracy")
    if limit is not None and accuracy < limit - BAYES_SLACK:
        warnings.append(
            f"the reward model's accuracy {accuracy:.3f} is far below the {limit:.3f} that is "
            "possible: PPO will exploit what it has not learned"
        )
    return warnings
