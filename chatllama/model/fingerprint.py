"""Fingerprints of weights: on which base an adapter was trained, and whether it is in use."""

import hashlib
from pathlib import Path
from typing import Any

from chatllama.config.model import BackboneSection
from chatllama.config.schema import Config
from chatllama.model.safetensors_header import read_header, read_index
from chatllama.runs.folder import RunFolder, base_path
from chatllama.runtime.files import file_hash

SAMPLE = 64
"""Bytes of each end of a tensor that a fingerprint covers."""


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


def check_base(cfg: Config, run: RunFolder, info: dict[str, Any], where: str) -> None:
    """Raises ValueError if the adapter of `info` was trained on other weights than the base in use.

    Older adapters hold no fingerprint. `where` names the adapter in the message.
    """
    path = base_path(cfg, run)
    found, expected = model_fingerprint(cfg.backbone, path), info.get("base_fingerprint")
    if found and expected and found != expected:
        raise ValueError(
            f"{where} was trained on another base: {info['base']} with fingerprint "
            f"{expected[:12]}, and {path} has {found[:12]}. An adapter fits its own base only: "
            "set backbone.path to that one (copy it again, if it was damaged), or train the "
            "earlier stages again"
        )


def model_folder(section: BackboneSection, path: str) -> Path | None:
    """The folder of the model at a path, or of a hub id if it is in the cache; else None."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    revision = section.revision if path == section.path else None
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def model_fingerprint(section: BackboneSection, path: str) -> str | None:
    """The fingerprint of the model at a path or, if it is in the cache, of a hub id."""
    folder = model_folder(section, path)
    return None if folder is None else fingerprint(folder)


def fingerprint(folder: Path) -> str | None:
    """A hash of a model's weights, whatever files they are split into; None if some are missing.

    Of names, types, shapes and both ends of every tensor: any training changes it, and a 70B model
    takes a second.
    """
    entries: dict[str, bytes] = {}
    for index in folder.glob("*.safetensors.index.json"):
        if not all(shard.is_file() for shard in read_index(index)):
            return None
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        with path.open("rb") as file:
            for name, entry in header.items():
                size = min(SAMPLE, entry.end - entry.begin)
                entries[name] = f"{entry.dtype}{list(entry.shape)}".encode()
                for place in (entry.begin, entry.end - size):
                    file.seek(place)
                    entries[name] += file.read(size)
    if not entries:
        return None
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(name.encode() + b"\0" + entries[name])
    return digest.hexdigest()
