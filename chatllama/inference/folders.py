"""What `chat`, `generate`, `serve` and `chatllama.load` open: a run, an adapter or a plain model.

Each becomes a run folder and a config, so that what comes after knows runs only. Loading the
weights is in `load.py`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Required, TypedDict

from chatllama.runs.folder import INFO, STAGES, RunFolder
from chatllama.runtime.json_files import MORE_KEYS, read_json

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config.schema import Config

ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class _Info(TypedDict, total=False):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    base: Required[str]
    stage: str
    contract: dict[str, Any]


class _OneAdapter(RunFolder):
    """A run of which one adapter is opened and no other seen."""

    def __init__(self, root: Path, adapter: Path, stage: str) -> None:
        super().__init__(root)
        nowhere = adapter / "not opened"
        self.sft_adapter = adapter if stage == "sft" else nowhere
        self.policy_adapter = adapter if stage == "ppo" else nowhere
        self.reward_adapter = adapter if stage == "reward" else nowhere
        self.ema_adapter = nowhere

    def reward_members(self) -> list[Path]:
        """The adapter itself."""
        return [self.reward_adapter]


def is_run(run: RunFolder) -> bool:
    """Whether it is the folder of a run, and no model or adapter in the shape of one."""
    return run.config.is_file()


def find_model(place: str | Path) -> "tuple[RunFolder, Config]":
    """The run folder and the config of what lies at `place`.

    A plain model, a folder or a hub id, is a run without adapters, whose `base` answers. An adapter
    that a run wrote is that run with no other role; elsewhere its chatllama.json names base and
    chat template.

    Raises:
        ValueError: there is none of them, or a value adapter, which neither answers nor scores.
    """
    from chatllama.config.loader import load_config

    folder = Path(place)
    run = RunFolder(folder)
    if HUB_ID.fullmatch(str(place)) and not folder.parent.is_dir():
        return run, _config(str(place), {})
    run.check_readable()
    if is_run(run):
        return run, load_config(run.config)
    if (folder / ADAPTER).is_file():
        return _find_adapter(folder)
    if (folder / "config.json").is_file():
        return run, _config(str(place), {})
    raise ValueError(
        f"{folder} is not a run folder: {run.config} is missing; nor is it a model, which has a "
        f"config.json, or an adapter, which has an {ADAPTER}"
    )


def _find_adapter(folder: Path) -> "tuple[RunFolder, Config]":
    from chatllama.config.loader import load_config

    if not (folder / INFO).is_file():
        raise ValueError(f"{folder}: no {INFO}; is this an adapter of a chatllama run?")
    if folder.name == "value":
        raise ValueError(f"{folder}: an adapter of PPO's value model, which has no answers")
    info, place = read_json(folder / INFO, _Info), folder.absolute()
    stage = info.get("stage", "ppo")
    if len(place.parents) > 1 and place.parent.name in STAGES:
        own = _OneAdapter(place.parents[1], folder, place.parent.name)
        if is_run(own):
            return own, load_config(own.config)
    contract = info.get("contract", {})
    known = {key: contract[key] for key in ("template", "system", "date") if key in contract}
    return _OneAdapter(folder, folder, stage), _config(info["base"], known)


def _config(base: str, chat: dict[str, Any]) -> "Config":
    """The config of a model without a run; weights are bfloat16, on the CPU float32."""
    from chatllama.config.schema import Config
    from chatllama.runtime.distributed import device

    dtype = "float32" if device().type == "cpu" else "bfloat16"
    return Config.model_validate(
        {"run_dir": base, "backbone": {"path": base, "dtype": dtype}, "chat": chat}
    )
