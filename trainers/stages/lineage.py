"""lineage.json: config, data, base, parents and code of each stage, by content hash.

Records are made and compared here; `decisions.py` decides which stages must run again.
"""

import hashlib
import json
import platform
from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from chatllama import __version__
from chatllama.config.base import Section
from chatllama.config.errors import nested_section
from chatllama.config.schema import Config
from chatllama.config.sources import DataSource
from chatllama.model.fingerprint import folder_hash
from chatllama.model.integrity import base_record, output_files
from chatllama.runs.folder import STAGES, RunFolder, Stage, read_lineage, write_record
from chatllama.runtime.digests import function_file
from chatllama.runtime.files import file_hash
from data.reading.files import named_files

PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "datasets", "accelerate",
            "tokenizers", "safetensors", "numpy")  # fmt: skip
SHARED = ("backbone", "chat", "lora", "seed")
SECTIONS: dict[Stage, tuple[str, ...]] = {
    "sft": ("sft", *SHARED),
    "reward": ("reward", *SHARED),
    "ppo": ("ppo", "generation", "evaluation", *SHARED),
}
FREE_KEYS = ("save_every", "save_total_limit", "eval_every", "allow_weak", "gradient_checkpointing",
             "liger_kernel", "adapter_dir")  # fmt: skip
FREE = ("sft.microbatch_size", "reward.microbatch_size", "generation.compile")
"""Keys that do not change what a stage learns: by their last part (FREE_KEYS) and in full."""
RESUMABLE = ("learning_rate", "value_learning_rate", "warmup_steps", "max_grad_norm")
"""Keys that a resumed stage may change, by their last part: they act on later steps alone."""


def gather(
    cfg: Config, run: RunFolder, stage: Stage, known: dict[str, Any], fresh: bool = False
) -> dict[str, Any]:
    """The record of a stage that would start now.

    Args:
        known: an older record; data files whose size and time it holds are not read again.
        fresh: reads every byte of the base.
    """
    return {
        "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "finished": None,
        "code": {"version": __version__, "source": _source_hash()},
        "packages": _packages(),
        "config": binding_config(cfg, stage),
        "base": base_record(cfg, run, fresh),
        "data": dict(_data(cfg, stage, known.get("data", {}))),
        "parents": parents(cfg, run, stage),
        "functions": _functions(cfg) if stage == "ppo" else {},
    }


def binding_config(cfg: Config, stage: Stage) -> dict[str, Any]:
    """Dotted key -> value of the settings that determine the stage's result."""
    content = json.loads(cfg.model_dump_json())
    chosen = {name: content[name] for name in SECTIONS[stage]}
    return _binding(flat(chosen))


def _binding(keys: dict[str, Any]) -> dict[str, Any]:
    """Those that determine a result; an older record may hold others, which have become free."""
    return {k: v for k, v in keys.items() if k not in FREE and k.split(".")[-1] not in FREE_KEYS}


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted name -> value; lists are values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{above}{key}."))
        else:
            out[above + key] = value
    return out


def differences(old: dict[str, Any], new: dict[str, Any], free: Collection[str] = ()) -> list[str]:
    """The differences for which the result of `old` is not that of `new`; empty if there are none.

    Keys in `free`, other paths of equal files and versions of code and packages do not count, nor
    does what only one record knows: data that has been removed, a base that is not in the hub's
    cache.
    """
    free = {*free, *_moved(old, new)}
    found = [
        f"{key}: {was!r} there, {is_!r} now"
        for key, (was, is_) in changed_keys(old, new).items()
        if key not in free
    ]
    was, is_ = (record["base"]["fingerprint"] for record in (old, new))
    if was and is_ and was != is_:
        paths = " and ".join(sorted({old["base"]["path"], new["base"]["path"]}))
        found.append(f"the base model has other weights ({paths})")
    for name in sorted(old["data"].keys() & new["data"].keys()):
        if old["data"][name]["sha256"] != new["data"][name]["sha256"]:
            found.append(f"data {name} has another content")
    if old["config"] == new["config"] and (added := new["data"].keys() - old["data"].keys()):
        found.append(f"data {', '.join(sorted(added))} is new")
    for name in sorted(old["parents"].keys() | new["parents"].keys()):
        was, is_ = old["parents"].get(name), new["parents"].get(name)
        if was != is_:
            found.append(f"it was made from another {name}")
    return found


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its values in two records' configs, where they differ."""
    known, now = _binding(old["config"]), new["config"]
    # A key missing in the record came with a later version, so it had its default value, unless
    # its whole section was null (`lora: null`).
    later = [key for key in now if not any(key.startswith(f"{name}.") for name in known)]
    before = dict.fromkeys(now) | {key: _default(key) for key in later} | known
    return {
        key: (was, now.get(key))
        for key, was in sorted(before.items())
        if _given(was) not in (_given(now.get(key)), _given(_without_folders(key, now.get(key))))
    }


def _given(value: Any) -> Any:
    """A list of sections without what is null, 0, false or empty: a later key is so by default."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in x.items() if v} if isinstance(x, dict) else x for x in value]


def _without_folders(key: str, value: Any) -> Any:
    """The names of functions as older records have them: without the folder of their module."""
    if key == "ppo.rewards":
        return [{k: _without_folders(k, v) for k, v in each.items()} for each in value or []]
    if key in ("function", "evaluation.gold") and value is not None:
        return value.rpartition("/")[2]
    return value


def resumable(
    old: dict[str, Any], new: dict[str, Any], stage: Stage, saved: Collection[int], members: int = 1
) -> dict[str, tuple[Any, Any]]:
    """Changed keys that an unfinished stage may be resumed with -> (value before, value now).

    The number of steps is one where no learning rate depends on it, or where no step is left; a
    path where the files are the same; the size of an ensemble where it leaves out the members that
    are not begun. Nothing has been evaluated yet.

    Args:
        saved: steps of its checkpoints.
        members: of the reward ensemble that are begun or finished.
    """
    last_parts = list(RESUMABLE)
    schedules = {record["config"].get(f"{stage}.lr_schedule") for record in (old, new)}
    if schedules == {"constant"} or new["config"].get(f"{stage}.steps") in saved:
        last_parts += ["steps"] if stage == "ppo" else ["steps", "epochs"]  # PPO's are of a batch
    keys = {f"{stage}.{each}" for each in last_parts} | _moved(old, new)
    if new["config"].get("reward.ensemble") == members:
        keys.add("reward.ensemble")
    return {
        key: values
        for key, values in changed_keys(old, new).items()
        if key in keys or key.startswith(("evaluation.", "ppo.health."))
    }


def more_steps(old: dict[str, Any], new: dict[str, Any], stage: Stage, made: float) -> bool:
    """Whether a finished stage, which made so many steps, is to have more of them."""
    steps = new["config"].get(f"{stage}.steps")
    if steps is not None:
        return steps > made
    before, epochs = changed_keys(old, new).get(f"{stage}.epochs", (0, 0))
    return epochs > before


def _moved(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Changed keys that name an equal base, or equal data, by other paths."""
    bases = [record["base"]["fingerprint"] for record in (old, new)]
    keys = {"backbone.path"} if bases[0] and bases[0] == bases[1] else set()
    hashes = [[each["sha256"] for each in record["data"].values()] for record in (old, new)]
    if hashes[0] != hashes[1] or None in hashes[0]:
        return keys
    return keys | {
        key
        for key, (was, now) in changed_keys(old, new).items()
        if _without_paths(now) and _without_paths(was) == _without_paths(now)
    }


def _without_paths(sources: Any) -> list[dict[str, Any]] | None:
    """Data sources of a config but for their paths; None for a value that is no list of them."""
    if not isinstance(sources, list) or not all(
        isinstance(s, dict) and "path" in s for s in sources
    ):
        return None
    return [{key: value for key, value in s.items() if key != "path"} for s in sources]


def _default(key: str) -> Any:
    """The default of a dotted key of the config; None if there is none."""
    *sections, last = key.split(".")
    section: type[BaseModel] | None = Config
    for name in sections:
        field = section.model_fields.get(name) if section is not None else None
        section = nested_section(field.annotation) if field is not None else None
    field = section.model_fields.get(last) if section is not None else None
    if field is None or field.is_required():
        return None
    return field.get_default(call_default_factory=True)


def other_versions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Changed versions of packages and code, in words."""
    found = [
        f"{name} {old['packages'].get(name)} then, {new['packages'].get(name)} now"
        for name in sorted(old["packages"].keys() | new["packages"].keys())
        if old["packages"].get(name) != new["packages"].get(name)
    ]
    before = old.get("functions", {})
    for name, sha in new.get("functions", {}).items():
        if None not in (sha, before.get(name)) and sha != before[name]:
            found.append(f"the file of function {name} has been changed")
    if old["code"] != new["code"]:
        found.append(f"chatllama {old['code']['version']} then, another source now")
    return found


def finish(cfg: Config, run: RunFolder, stage: Stage) -> None:
    """Completes the record of a stage whose results are written."""
    record = read_lineage(run)[stage]
    record["base"] = base_record(cfg, run)  # a hub model may have come in the meantime
    record["outputs"] = outputs(cfg, run, stage)
    record["files"] = output_files(run, record["outputs"])
    record["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_record(run, stage, record)


def outputs(cfg: Config, run: RunFolder, stage: Stage) -> dict[str, str | None]:
    """Folder below the run -> hash of the stage's result in it; None if it is missing."""
    folders = {
        "sft": [run.sft_adapter if cfg.lora is not None else run.full_model],
        "reward": run.reward_members(),
        "ppo": [run.policy_adapter, run.value_adapter, run.ema_adapter],
    }[stage]
    optional = (run.value_adapter, run.ema_adapter)
    return {
        folder.relative_to(run.root).as_posix(): folder_hash(folder)
        for folder in folders
        if folder.is_dir() or folder not in optional
    }


def made_from(cfg: Config, stage: Stage) -> list[Stage]:
    """The earlier stages of the run whose results a stage starts from."""
    earlier = STAGES[: STAGES.index(stage)]
    scored = any(source.adapter == "run" for source in cfg.ppo.rewards)
    return [each for each in earlier if each in cfg.stages and (each == "sft" or scored)]


def parents(cfg: Config, run: RunFolder, stage: Stage) -> dict[str, str | None]:
    """Name -> hash of every adapter or model that the stage starts from."""
    found: dict[str, str | None] = {}
    for earlier in made_from(cfg, stage):
        found |= outputs(cfg, run, earlier)
    if stage == "ppo":
        given = [source.adapter for source in cfg.ppo.rewards]
        found |= {path: folder_hash(Path(path)) for path in given if path not in (None, "run")}
    return found


def _functions(cfg: Config) -> dict[str, str | None]:
    """Name of each function of the config -> hash of its file, where that is known."""
    names = [source.function for source in cfg.ppo.rewards] + [cfg.evaluation.gold]
    files = {name: function_file(name) for name in names if name is not None}
    return {name: file and file_hash(file) for name, file in files.items()}


def _data(cfg: Config, stage: Stage, known: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data file of the stage with size, time and hash; hub ids without them.

    A finished adapter that takes the place of training counts as data, too.
    """
    files: dict[str, Path] = {}
    for source in _sources(cfg, stage):
        try:
            paths = named_files(source.path, source.split)
        except ValueError:  # removed since; the stage reports it if it needs it
            continue
        if paths is None:
            yield source.path, {"hub": source.subset or source.split, "sha256": None}
        files |= paths or {}
    adapter = {"sft": cfg.sft.adapter, "reward": cfg.reward.adapter, "ppo": None}[stage]
    if adapter is not None:
        files |= {str(path): path for path in sorted(Path(adapter).glob("*")) if path.is_file()}
    for name, path in files.items():
        stat = path.stat()
        size_and_time = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        before = known.get(name, {})
        if size_and_time.items() <= before.items():
            yield name, before
        else:
            yield name, {**size_and_time, "sha256": file_hash(path)}


def _sources(cfg: Config, stage: Stage) -> list[DataSource]:
    """Every data source that the stage reads."""
    sections: list[Section] = [{"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}[stage]]
    if stage == "sft" and cfg.backbone.from_scratch is not None:
        sections.append(cfg.backbone.from_scratch)
    lists = [value for section in sections for _, value in section if isinstance(value, list)]
    return [each for values in lists for each in values if isinstance(each, DataSource)]


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _source_hash() -> str:
    """A hash of this project's modules."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for room in ("chatllama", "data", "trainers"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
