"""The tensors of a Hugging Face folder, read one at a time; also with an adapter added to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from chatllama.export import SavedAdapter
from chatllama.safetensors_writer import TORCH_TYPES

_PREFIX = "base_model.model."
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja")


@dataclass(frozen=True)
class ModelFiles:
    """Names, shapes and types of a model's tensors, and how to get one."""

    shapes: Mapping[str, tuple[int, ...]]
    """In the order of the files."""
    dtypes: Mapping[str, torch.dtype]
    tensor: Callable[[str], torch.Tensor]


def local_folder(path: str, revision: str | None = None) -> Path:
    """A model's folder on this machine; a hub id is downloaded, or found in the cache."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, revision=revision, allow_patterns=list(_FILES)))


def open_model(folder: Path) -> ModelFiles:
    """The tensors in the folder's safetensors files.

    Raises:
        ValueError: there are none, or a file is cut off.
    """
    places: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    places[name], shapes[name] = file, tuple(part.get_shape())
                    if part.get_dtype() not in TORCH_TYPES:
                        raise ValueError(f"{file}: {name} is of type {part.get_dtype()}")
                    dtypes[name] = TORCH_TYPES[part.get_dtype()]
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged: {error}") from error
    if not places:
        raise ValueError(f"{folder}: no safetensors files")

    def tensor(name: str) -> torch.Tensor:
        with safe_open(places[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return ModelFiles(shapes, dtypes, tensor)


def merged(base: ModelFiles, adapter: SavedAdapter | None, dtype: torch.dtype) -> ModelFiles:
    """The base with the adapter's products added: W + alpha / r * B A, added up in float32.

    Args:
        base: tensors of the unquantised base.
        adapter: plain LoRA. None: only the type changes.
        dtype: of the results.

    Raises:
        ValueError: the adapter changes a tensor that the base does not have, or of another shape.
    """
    if adapter is None:
        same = dict.fromkeys(base.shapes, dtype)
        return ModelFiles(base.shapes, same, lambda name: cast_to(base.tensor(name), dtype, name))
    scale = adapter.lora.alpha / adapter.lora.r
    changed = {name.removeprefix(_PREFIX).replace(".lora_A.", "."): name for name in adapter.state}
    changed = {name: key for name, key in changed.items() if ".lora_B." not in name}
    for name, key in changed.items():
        a, b = adapter.state[key], adapter.state[key.replace(".lora_A.", ".lora_B.")]
        if base.shapes.get(name) != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"the adapter changes {name} of shape {(b.shape[0], a.shape[1])}; in the base it "
                f"has {base.shapes.get(name, 'no such tensor')}"
            )

    def tensor(name: str) -> torch.Tensor:
        weight = base.tensor(name)
        if (key := changed.get(name)) is not None:
            a, b = adapter.state[key], adapter.state[key.replace(".lora_A.", ".lora_B.")]
            weight = weight.float() + scale * (b.float() @ a.float())
        return cast_to(weight, dtype, name)

    return ModelFiles(base.shapes, dict.fromkeys(base.shapes, dtype), tensor)


def cast_to(weight: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The weight in another type.

    Raises:
        ValueError: the type does not reach that far.
    """
    converted = weight.to(dtype)
    if not torch.isfinite(converted).all():
        raise ValueError(f"{name} is too large for {dtype}: choose another --dtype")
    return converted
