"""Where a model's shape comes from: its config.json, or the list of published ones."""

import json
from pathlib import Path

from chatllama.config.schema import Config
from chatllama.planning.published import published_shape
from chatllama.planning.shape import ModelShape, from_scratch_shape, read_shape
from chatllama.runs.folder import RunFolder, backbone_path


def find_shape(cfg: Config, model_config: Path | None = None) -> tuple[ModelShape, str]:
    """The shape of the backbone, and where it was read.

    A local folder, the list of published models, the hub's cache, and at last the hub itself, of
    which config.json alone is fetched.

    Args:
        model_config: a config.json that counts instead of the backbone's.

    Raises:
        ValueError: there is none, or it describes no model that can be planned.
    """
    section = cfg.backbone
    folder = Path(backbone_path(section, RunFolder(Path(cfg.run_dir))))
    file = model_config or folder / "config.json"
    if model_config is not None or file.is_file():
        return _read(file), str(file)
    if section.from_scratch is not None:
        return from_scratch_shape(section.from_scratch), "backbone.from_scratch"
    if folder.is_dir():
        raise ValueError(f"backbone.path: {section.path!r} holds no config.json")
    hub_id = str(section.path)
    known = published_shape(hub_id)
    if known is not None:
        return known, f"the published {hub_id}"
    return _read(_fetched(hub_id, section.revision)), f"{hub_id} on the hub"


def _read(file: Path) -> ModelShape:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a model's config.json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no model's config.json: it holds no mapping")
    return read_shape(content, str(file))


def reward_model_bytes(path: str) -> float | None:
    """Bytes of the weights of a reward model of any family; None: they are not on this machine.

    It is loaded in the type of its files.

    Args:
        path: a folder, or a hub id whose files are in the cache.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(path, "config.json")
        except ValueError:  # neither a folder nor a hub id
            found = None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := list(folder.glob(pattern)):
            return float(sum(file.stat().st_size for file in files))
    return None


def _fetched(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"backbone.path: the config.json of {hub_id!r} is neither here nor to be had from the "
            f"hub ({reason}). Give it with --model-config FILE"
        ) from error
