"""The layout of a run folder: every path that one part writes and another reads, and lineage.json.

What lineage.json records, and what follows from it, is in `trainers/stages/`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import NotRequired, TypedDict

from chatllama.config.nearest import files_like
from chatllama.runtime.files import write_json
from chatllama.runtime.json_files import MORE_KEYS, read_json

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config.model import BackboneSection
    from chatllama.config.schema import Config

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")
STEP = "step-"
"""What the name of a complete checkpoint begins with."""
INFO = "chatllama.json"
"""Beside every adapter and model that was made here: what it is."""


class _Data(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    sha256: str | None


class _Base(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    path: str
    fingerprint: str | None
    files: NotRequired[dict[str, str]]
    commit: NotRequired[str]


class Machine(TypedDict):
    """A machine of a job, as `runtime/machine.py` describes it."""

    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    cpu: str
    cores: int
    memory_gb: float
    ranks: int
    gpus: dict[str, int]


class _Record(TypedDict):
    """What lineage.json holds of a stage; `trainers/stages/lineage.py` writes it."""

    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    begun: str
    finished: str | None
    code: dict[str, str]
    packages: dict[str, str]
    config: dict[str, Any]
    base: _Base
    data: dict[str, _Data]
    parents: dict[str, str | None]
    functions: NotRequired[dict[str, str | None]]
    outputs: NotRequired[dict[str, str | None]]
    files: NotRequired[dict[str, str | None]]
    changed: NotRequired[list[list[str]]]
    hardware: NotRequired[list[list[Machine]]]


@dataclass
class RunFolder:
    """Paths below `run_dir`; naming a path creates nothing."""

    root: Path

    def __post_init__(self) -> None:
        self.config = self.root / "config.yaml"
        """The resolved YAML; it can be loaded as it is."""
        self.lineage = self.root / "lineage.json"
        """What each stage was made from."""
        self.evaluation = self.root / "evaluation.json"
        """Measurements of every role's held-out answers."""
        self.summary = self.root / "summary.json"
        """The numbers of the finished run."""
        self.report = self.root / "report.html"
        """The page that shows them."""
        self.backbone = self.root / "backbone"
        """Hugging Face folder, only when the backbone was built or imported here."""
        self.full_model = self.root / "sft" / "model"
        """Hugging Face folder: the result of SFT with `lora: null`, base of later stages."""
        self.sft_adapter = self.root / "sft" / "adapter"
        """PEFT folder of the SFT stage."""
        self.reward_adapter = self.root / "reward" / "adapter"
        """PEFT folder of the reward stage, score head included; member 0 of an ensemble."""
        self.reward_diagnosis = self.root / "reward" / "doctor.json"
        """Findings on preference data and reward model."""
        self.policy_adapter = self.root / "ppo" / "policy"
        """PEFT folder of the PPO policy."""
        self.evaluations = self.root / "ppo" / "evaluations.jsonl"
        """The policy's answers to the held-out prompts at each evaluation; step 0: its start's."""
        self.overoptimisation = self.root / "overoptimisation.json"
        """Gold and proxy reward of PPO and best-of-n over the KL."""
        self.ema_adapter = self.root / "ppo" / "policy-ema"
        """PEFT folder of the averaged policy, where `ppo.ema_decay` is set."""
        self.value_adapter = self.root / "ppo" / "value"
        """PEFT folder of the PPO value model, head included."""

    def existing_config(self) -> Path:
        """`config`; raises ValueError where it is missing or the folder cannot be read."""
        self.check_readable()
        if not self.config.is_file():
            raise ValueError(f"{self.root} is not a run folder: {self.config} is missing")
        return self.config

    def check_readable(self) -> None:
        """Raises ValueError if `root` is no folder whose files this process can read."""
        try:
            os.stat(self.root)
            if self.root.is_dir() and os.access(self.root, os.R_OK | os.X_OK):
                return
            reason = "there is no right to read it" if self.root.is_dir() else "it is a file"
        except FileNotFoundError:
            reason = f"it does not exist{files_like(self.root)}"
            if self.root.is_symlink():
                reason = f"it is a link to {os.readlink(self.root)}, which is not there"
        except OSError as error:
            reason = str(error.strerror)
        raise ValueError(f"{self.root} is not a run folder: {reason}. `chatllama runs` lists them")

    def reward_member(self, number: int) -> Path:
        """PEFT folder of member `number` of the reward ensemble, from 0."""
        folder = self.reward_adapter
        return folder if number == 0 else folder.with_name(f"{folder.name}-{number}")

    def reward_members(self) -> list[Path]:
        """PEFT folders of the reward ensemble, `reward_adapter` first.

        Raises:
            ValueError: a folder adapter-X whose X is no number.
        """
        members: dict[int, Path] = {}
        for path in self.reward_adapter.parent.glob("adapter-*"):
            number = path.name.removeprefix("adapter-")
            if not number.isdecimal() and path.is_dir():
                raise ValueError(
                    f"{path} is no member of the reward ensemble, which are adapter, adapter-1, "
                    f"adapter-2 and so on: move it out of {path.parent}"
                )
            if path.is_dir():
                members[int(number)] = path
        return [self.reward_adapter, *(members[number] for number in sorted(members))]

    def reward_run(self, member: int) -> "RunFolder":
        """Where a member of the reward ensemble keeps metrics and checkpoints; member 0 here."""
        if member == 0:
            return self
        return RunFolder(self.checkpoints("reward") / f"member-{member}")

    @property
    def members(self) -> Path:
        """What the finished members of an interrupted ensemble found; only ensembles have it."""
        return self.checkpoints("reward") / "members.json"

    def finished_members(self) -> int:
        """The number of members in `members`."""
        if not self.members.is_file():
            return 0
        return len(read_json(self.members, list[dict[str, Any]]))

    def stage(self, stage: Stage) -> Path:
        """Folder of one stage."""
        return self.root / stage

    def metrics(self, stage: Stage) -> Path:
        """One JSON object a line for each logged step."""
        return self.root / stage / "metrics.jsonl"

    def samples(self, stage: Stage) -> Path:
        """One JSON object a line for each answer that was sampled and shown."""
        return self.root / stage / "samples.jsonl"

    def log(self, stage: Stage) -> Path:
        """What launcher and libraries say while the stage runs."""
        return self.root / stage / "log.txt"

    def checkpoints(self, stage: Stage) -> Path:
        """Folder of `step-N` folders."""
        return self.root / stage / "checkpoints"

    def was_begun(self, stage: Stage) -> bool:
        """True where an interrupted start left checkpoints or finished members of an ensemble."""
        folder = self.checkpoints(stage)
        steps = (p.name.removeprefix("step-") for p in folder.rglob("step-*"))
        return (folder / "members.json").is_file() or any(step.isdecimal() for step in steps)

    def interrupted(self, stage: Stage) -> Path:
        """The step at which a signal stopped the stage."""
        return self.root / stage / "interrupted.json"

    def failed(self, stage: Stage) -> Path:
        """Why a stage that has no result was refused or failed."""
        return self.root / stage / "failed.json"

    def result(self, stage: Stage) -> Path:
        """Closing numbers, written last: where it exists, the stage has finished."""
        return self.root / stage / "result.json"

    def read_result(self, stage: Stage) -> dict[str, float]:
        """Closing numbers; raises ValueError where the stage has not finished."""
        path = self.result(stage)
        if not path.is_file():
            raise ValueError(f"stage {stage} of {self.root} has not finished: {path} is missing")
        return read_json(path, dict[str, int | float])


def check_run_dir(root: Path) -> None:
    """Raises ValueError if `root` is not, and cannot become, a folder that this process writes."""
    try:
        if root.is_symlink() and not root.exists():
            reason = f"it is a link to {os.readlink(root)}, which is not there"
        else:
            root.mkdir(parents=True, exist_ok=True)
            if os.access(root, os.W_OK):
                return
            reason = "there is no right to write in it"
    except FileExistsError:
        reason = "it is a file"
    except OSError as error:
        reason = str(error.strerror)
    raise ValueError(f"run_dir: {root} cannot be the run folder: {reason}. Give another run_dir")


def step_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest step first."""
    found = [p for p in folder.glob(f"{STEP}*") if p.name.removeprefix(STEP).isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of `step-N`."""
    return int(checkpoint.name.removeprefix(STEP))


def read_lineage(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The record of each stage; empty where none is written."""
    if not run.lineage.is_file():
        return {}
    return read_json(run.lineage, dict[str, _Record])


def write_record(run: RunFolder, stage: Stage, record: dict[str, Any] | None) -> None:
    """Replaces the record of a stage; None removes it."""
    records: dict[str, Any] = {**read_lineage(run), stage: record}
    kept = {name: records[name] for name in STAGES if records.get(name) is not None}
    write_json(run.lineage, kept)


def backbone_path(section: "BackboneSection", run: RunFolder) -> str:
    """Folder or hub id of the original backbone; RUN/backbone when it was built here."""
    return section.path if section.path is not None else str(run.backbone)


def base_path(cfg: "Config", run: RunFolder) -> str:
    """Folder or hub id of the base of the reward and PPO stages.

    The original backbone, or with `lora: null` the fully trained result of SFT.
    """
    return backbone_path(cfg.backbone, run) if cfg.lora is not None else str(run.full_model)
