"""lineage.json: what each stage was made from, by content: config, data, base, parents, code.

Whether a stage must run again is decided from it in `decisions.py`; here is what is recorded, and
how two records differ.
"""

import hashlib
import json
import platform
import struct
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from chatllama import __version__
from chatllama.backbone_path import backbone_path, base_path
from chatllama.config import BackboneSection, Config, DataSource, Section
from chatllama.config_errors import nested_section
from chatllama.manifest import file_hash
from chatllama.run_folder import STAGES, RunFolder, Stage, write_json

FindFiles = Callable[[str, str], dict[str, Path] | None]
"""Files that a `path` and `split` of the config name, by name; None: a hub id."""

PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "datasets", "accelerate",
            "tokenizers", "safetensors", "numpy")  # fmt: skip
SHARED = ("backbone", "chat", "lora", "seed")
SECTIONS: dict[Stage, tuple[str, ...]] = {
    "sft": ("sft", *SHARED),
    "reward": ("reward", *SHARED),
    "ppo": ("ppo", "generation", "evaluation", *SHARED),
}
FREE_KEYS = ("save_every", "save_total_limit", "eval_every", "allow_weak", "gradient_checkpointing",
             "liger_kernel")  # fmt: skip
FREE = ("sft.microbatch_size", "reward.microbatch_size")
"""Keys that change nothing of what a stage learns: by their last part, and by the whole of it."""
SAMPLE = 64
"""Bytes of each end of a tensor that a fingerprint looks at."""


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


def gather(
    cfg: Config, run: RunFolder, stage: Stage, find_files: FindFiles, known: dict[str, Any]
) -> dict[str, Any]:
    """What the stage would be made from now.

    Args:
        cfg: the whole config.
        run: holds the stage's parents.
        stage: whose record.
        find_files: of the config's data.
        known: an older record: files with its sizes and times are not read again.
    """
    return {
        "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "finished": None,
        "code": {"version": __version__, "source": _source_hash()},
        "packages": _packages(),
        "config": binding_config(cfg, stage),
        "base": base_record(cfg, run),
        "data": dict(_data(cfg, stage, find_files, known.get("data", {}))),
        "parents": parents(cfg, run, stage),
    }


def binding_config(cfg: Config, stage: Stage) -> dict[str, Any]:
    """Dotted key -> value of the settings on which the stage's result rests."""
    content = json.loads(cfg.model_dump_json())
    chosen = {name: content[name] for name in SECTIONS[stage]}
    keys = flat(chosen).items()
    return {k: v for k, v in keys if k not in FREE and k.split(".")[-1] not in FREE_KEYS}


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted name -> value; lists are values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{above}{key}."))
        else:
            out[above + key] = value
    return out


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why what was made by `old` is not what `new` would make; empty: it is.

    Versions of code and packages are no reason. What is not known on both sides is none either:
    data that has been removed, a base that is not in the hub's cache.
    """
    known, now = old["config"], new["config"]
    # A key that the record does not know came with a later version, and was as it is by default;
    # not one of a section that was there as a whole (`lora: null`).
    later = [key for key in now if not any(key.startswith(f"{name}.") for name in known)]
    before = dict.fromkeys(now) | {key: _default(key) for key in later} | known
    free = () if old["finished"] else ("evaluation",)  # an unfinished stage has evaluated nothing
    found = [
        f"{key}: {value!r} there, {now.get(key)!r} now"
        for key, value in sorted(before.items())
        if value != now.get(key) and key.split(".")[0] not in free
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


def _default(key: str) -> Any:
    """The default of a dotted key of the config; None where there is none."""
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
    """What of code and packages is not as it was, for the reader."""
    found = [
        f"{name} {old['packages'].get(name)} then, {new['packages'].get(name)} now"
        for name in sorted(old["packages"].keys() | new["packages"].keys())
        if old["packages"].get(name) != new["packages"].get(name)
    ]
    if old["code"] != new["code"]:
        found.append(f"chatllama {old['code']['version']} then, another source now")
    return found


def finish(cfg: Config, run: RunFolder, stage: Stage) -> None:
    """Completes the record of a stage whose results are written."""
    record = read_lineage(run)[stage]
    record["base"] = base_record(cfg, run)  # a hub model may have come in the meantime
    record["outputs"] = outputs(cfg, run, stage)
    record["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_record(run, stage, record)


def outputs(cfg: Config, run: RunFolder, stage: Stage) -> dict[str, str | None]:
    """Folder below the run -> hash of what the stage left there; null where it is missing."""
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


def parents(cfg: Config, run: RunFolder, stage: Stage) -> dict[str, str | None]:
    """Name -> hash of every adapter or model that the stage starts from."""
    if stage == "sft":
        return {}
    found = outputs(cfg, run, "sft")
    if stage == "ppo":
        for source in cfg.ppo.rewards:
            if source.adapter == "run":
                found |= outputs(cfg, run, "reward")
            elif source.adapter is not None:
                found[source.adapter] = folder_hash(Path(source.adapter))
    return found


def folder_hash(folder: Path) -> str | None:
    """One hash of an adapter's files, or a whole model's fingerprint; None: not there."""
    if not folder.is_dir():
        return None
    if (folder / "config.json").is_file():
        return fingerprint(folder)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{path.name}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()


def base_record(cfg: Config, run: RunFolder) -> dict[str, str | None]:
    """Path and fingerprint of the original backbone."""
    path = backbone_path(cfg.backbone, run)
    return {"path": path, "fingerprint": model_fingerprint(cfg.backbone, path)}


def check_base(cfg: Config, run: RunFolder, info: dict[str, Any], where: str) -> None:
    """Nothing, where an adapter was trained on the base that is in use.

    Args:
        cfg: names the base in use.
        run: holds it, if it was made there.
        info: of the adapter; older ones know no fingerprint.
        where: the adapter's folder, for the message.

    Raises:
        ValueError: the weights are others.
    """
    path = base_path(cfg, run)
    found, expected = model_fingerprint(cfg.backbone, path), info.get("base_fingerprint")
    if found and expected and found != expected:
        raise ValueError(
            f"{where} was trained on another base: {info['base']} with fingerprint "
            f"{expected[:12]}, and {path} has {found[:12]}. An adapter fits its own base only: "
            "set backbone.path to that one, or train the earlier stages again"
        )


def model_fingerprint(section: BackboneSection, path: str) -> str | None:
    """The fingerprint of the model at a path or, if it is in the cache, of a hub id."""
    if Path(path).is_dir():
        return fingerprint(Path(path))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    revision = section.revision if path == section.path else None
    try:
        return fingerprint(Path(snapshot_download(path, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fingerprint(folder: Path) -> str | None:
    """A hash of a model's weights that does not depend on how they are split into files.

    It sees names, types, shapes and both ends of every tensor: any training changes it, and a 70B
    model takes a second. None: no safetensors there, or not all of them yet.
    """
    entries: dict[str, bytes] = {}
    for index in folder.glob("*.safetensors.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if not all((folder / shard).is_file() for shard in shards):
            return None
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError) as error:
                raise ValueError(f"{path} is damaged: no safetensors header") from error
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                size = min(SAMPLE, end - begin)
                file.seek(begin)
                ends = file.read(size)
                file.seek(end - size)
                ends += file.read(size)
                entries[name] = f"{entry['dtype']}{entry['shape']}".encode() + ends
    if not entries:
        return None
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(name.encode() + b"\0" + entries[name])
    return digest.hexdigest()


def _data(
    cfg: Config, stage: Stage, find_files: FindFiles, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data file of the stage with size, time and hash; hub ids without."""
    for source in _sources(cfg, stage):
        try:
            paths = find_files(source.path, source.split)
        except ValueError:  # removed since; the stage itself says so if it needs it
            continue
        if paths is None:
            yield source.path, {"hub": source.subset or source.split, "sha256": None}
        for name, path in (paths or {}).items():
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
    """A hash of this project's own modules."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in ("chatllama", "data", "trainers"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
