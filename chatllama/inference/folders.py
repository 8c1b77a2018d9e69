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


class _Peft(TypedDict, total=False):
    """Keys of adapter_config.json that name what the adapter is for."""

    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    base_model_name_or_path: str | None
    task_type: str | None


class OneAdapter(RunFolder):
    """A run of which one adapter is opened and no other seen.

    Args:
        plain: of PEFT alone, without what a run writes beside it.
    """

    def __init__(self, root: Path, adapter: Path, stage: str, plain: bool = False) -> None:
        super().__init__(root)
        self.adapter, self.plain = adapter, plain
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
    chat template. One of plain PEFT answers as `sft`, or scores where it has a head for that.

    Raises:
        ValueError: there is none of them, a value adapter, which neither answers nor scores, or an
            adapter whose base is not to be found.
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
        return _find_plain(folder)
    if folder.name == "value":
        raise ValueError(f"{folder}: an adapter of PPO's value model, which has no answers")
    info, place = read_json(folder / INFO, _Info), folder.absolute()
    stage = info.get("stage", "ppo")
    if len(place.parents) > 1 and place.parent.name in STAGES:
        own = OneAdapter(place.parents[1], folder, place.parent.name)
        if is_run(own):
            return own, load_config(own.config)
    contract = info.get("contract", {})
    known = {key: contract[key] for key in ("template", "system", "date") if key in contract}
    return OneAdapter(folder, folder, stage), _config(info["base"], known)


def _find_plain(folder: Path) -> "tuple[RunFolder, Config]":
    """An adapter of plain PEFT, whose own config names its base."""
    file = folder / ADAPTER
    found = read_json(file, _Peft)
    base, key = found.get("base_model_name_or_path"), "base_model_name_or_path"
    if not base:
        raise ValueError(f"{file}: no {key}, so its base is not known: write the base there")
    if not Path(base).is_dir() and (not HUB_ID.fullmatch(base) or Path(base).parent.is_dir()):
        raise ValueError(
            f"{file}: its base {base} is no folder here and no hub id: write where it lies as {key}"
        )
    stage = "reward" if found.get("task_type") == "SEQ_CLS" else "sft"
    return OneAdapter(folder, folder, stage, plain=True), _config(base, {})


def _config(base: str, chat: dict[str, Any]) -> "Config":
    """The config of a model without a run; weights are bfloat16, on the CPU float32."""
    from chatllama.config.schema import Config
    from chatllama.runtime.distributed import device

    dtype = "float32" if device().type == "cpu" else "bfloat16"
    return Config.model_validate(
        {"run_dir": base, "backbone": {"path": base, "dtype": dtype}, "chat": chat}
    )
