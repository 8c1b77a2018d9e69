"""The layout of a run folder: every path that one part writes and another reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chatllama.runtime.files import write_json

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config.model import BackboneSection
    from chatllama.config.schema import Config

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")
INFO = "chatllama.json"
"""Beside every adapter and model that was made here: what it is."""


@dataclass(frozen=True)
class RunFolder:
    """Paths below `run_dir`; nothing is created by naming a path."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved YAML, loadable as it is."""
        return self.root / "config.yaml"

    def existing_config(self) -> Path:
        """The resolved YAML, which is there.

        Raises:
            ValueError: this is not a run folder.
        """
        if not self.config.is_file():
            raise ValueError(f"{self.root} is not a run folder: {self.config} is missing")
        return self.config

    @property
    def lineage(self) -> Path:
        """What each stage was made from."""
        return self.root / "lineage.json"

    @property
    def summary(self) -> Path:
        """The numbers of the finished run."""
        return self.root / "summary.json"

    @property
    def evaluation(self) -> Path:
        """Held-out answers of every role, measured."""
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        """The page that shows them."""
        return self.root / "report.html"

    @property
    def backbone(self) -> Path:
        """Plain Hugging Face folder, only when the backbone was built or imported here."""
        return self.root / "backbone"

    @property
    def full_model(self) -> Path:
        """Plain Hugging Face folder: the result of SFT with `lora: null`, base of later stages."""
        return self.root / "sft" / "model"

    @property
    def sft_adapter(self) -> Path:
        """PEFT folder of the SFT stage."""
        return self.root / "sft" / "adapter"

    @property
    def reward_adapter(self) -> Path:
        """PEFT folder of the reward stage, score head included."""
        return self.root / "reward" / "adapter"

    def reward_members(self) -> list[Path]:
        """PEFT folders of the reward ensemble, the first being `reward_adapter`."""
        others = sorted(
            (p for p in self.reward_adapter.parent.glob("adapter-*") if p.is_dir()),
            key=lambda path: int(path.name.removeprefix("adapter-")),
        )
        return [self.reward_adapter, *others]

    @property
    def ema_adapter(self) -> Path:
        """PEFT folder of the averaged policy, where `ppo.ema_decay` is set."""
        return self.root / "ppo" / "policy-ema"

    @property
    def policy_adapter(self) -> Path:
        """PEFT folder of the PPO policy."""
        return self.root / "ppo" / "policy"

    @property
    def value_adapter(self) -> Path:
        """PEFT folder of the PPO value model, head included."""
        return self.root / "ppo" / "value"

    def stage(self, stage: Stage) -> Path:
        """Folder of one stage."""
        return self.root / stage

    def metrics(self, stage: Stage) -> Path:
        """One JSON object a line, one line a logged step."""
        return self.root / stage / "metrics.jsonl"

    def checkpoints(self, stage: Stage) -> Path:
        """Folder of `step-N` folders."""
        return self.root / stage / "checkpoints"

    def was_begun(self, stage: Stage) -> bool:
        """Whether an interrupted start left checkpoints or finished members of an ensemble."""
        folder = self.checkpoints(stage)
        steps = (p.name.removeprefix("step-") for p in folder.rglob("step-*"))
        return (folder / "members.json").is_file() or any(step.isdigit() for step in steps)

    def result(self, stage: Stage) -> Path:
        """Written last by a stage: its closing numbers. Its presence means: finished."""
        return self.root / stage / "result.json"

    def interrupted(self, stage: Stage) -> Path:
        """Says at which step a stage was saved when it was told to stop."""
        return self.root / stage / "interrupted.json"

    def read_result(self, stage: Stage) -> dict[str, float]:
        """Closing numbers of a finished stage.

        Raises:
            ValueError: the stage has not finished.
        """
        path = self.result(stage)
        if not path.is_file():
            raise ValueError(f"stage {stage} of {self.root} has not finished: {path} is missing")
        return json.loads(path.read_text(encoding="utf-8"))


def read_lineage(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Stage -> its record; empty where there is none."""
    if not run.lineage.is_file():
        return {}
    try:
        return json.loads(run.lineage.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run.lineage} is damaged: {error}") from error


def write_record(run: RunFolder, stage: Stage, record: dict[str, Any] | None) -> None:
    """Replaces the record of a stage; None removes it."""
    records = read_lineage(run)
    records.pop(stage, None)
    if record is not None:
        records[stage] = record
    write_json(run.lineage, {name: records[name] for name in STAGES if name in records})


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


def backbone_path(section: "BackboneSection", run: RunFolder) -> str:
    """Folder or hub id of the original backbone; RUN/backbone when it was built here."""
    return section.path if section.path is not None else str(run.backbone)


def base_path(cfg: "Config", run: RunFolder) -> str:
    """Folder or hub id of the base of the reward and PPO stages.

    The original backbone, or with `lora: null` the fully trained result of SFT.
    """
    return backbone_path(cfg.backbone, run) if cfg.lora is not None else str(run.full_model)
