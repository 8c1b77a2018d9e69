"""Files of the hub in its cache on this machine."""

from collections.abc import Sequence
from pathlib import Path


def hub_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A repository's files that fit the patterns, downloaded or found in the cache.

    Raises:
        ValueError: the cache cannot be written; other errors are those of huggingface_hub.
    """
    from huggingface_hub import constants, snapshot_download  # half a second

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except OSError as error:
        if error.errno is None:  # of the hub, not of this machine's disk
            raise
        raise unwritable(f"{name}: the hub's cache", constants.HF_HUB_CACHE, error) from error


def model_folder(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A model's folder on this machine; of a hub id, the files that fit the patterns.

    Raises:
        ValueError: neither a folder nor a readable hub id.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return hub_folder(path, revision, patterns)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        hub = f" ({str(error).strip().splitlines()[0]})"
        raise ValueError(
            f"no model at {path!r}: give a local Hugging Face folder (with config.json and "
            f"model.safetensors) or a hub id{'' if isinstance(error, HFValidationError) else hub}"
        ) from error


def unwritable(what: str, folder: str | Path, error: OSError) -> ValueError:
    """The error for a cache that cannot be written, with what to set."""
    return ValueError(
        f"{what}, {folder}, cannot be written ({error.strerror or error}): set HF_HOME to a folder "
        "that can be, or make room there"
    )
