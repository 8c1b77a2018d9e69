"""Files of the hub in its cache on this machine."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download


def hub_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A repository's files that fit the patterns, downloaded or found in the cache.

    Raises:
        ValueError: the cache cannot be written; other errors are those of huggingface_hub.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except OSError as error:
        if error.errno is None:  # of the hub, not of this machine's disk
            raise
        raise unwritable(f"{name}: the hub's cache", constants.HF_HUB_CACHE, error) from error


def unwritable(what: str, folder: str | Path, error: OSError) -> ValueError:
    """The error for a cache that cannot be written, with what to set."""
    return ValueError(
        f"{what}, {folder}, cannot be written ({error.strerror or error}): set HF_HOME to a folder "
        "that can be, or make room there"
    )
