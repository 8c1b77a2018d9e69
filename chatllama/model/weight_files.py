"""The tensors of a Hugging Face folder, read, added up with an adapter, and written one at a time.

`safetensors.torch.save_file` needs all tensors of a file at once. The format: the header's length
(8 bytes, little endian), the header (JSON), the tensors' bytes.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from chatllama.model.adapters import SavedAdapter
from chatllama.model.safetensors_header import model_files, read_header
from chatllama.runtime.files import write_json
from chatllama.runtime.hub import model_folder

TORCH_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_FILE_BYTES = 5 * 10**9
"""Of a file of weights; a model that needs several gets an index."""
_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
_PREFIX = "base_model.model."
_FILES = ("model*.safetensors", "*.json", "tokenizer*", "*.jinja")


@dataclass(frozen=True)
class ModelFiles:
    """A model's tensors: names, shapes, types and a function that reads one."""

    shapes: Mapping[str, tuple[int, ...]]
    """In the order of the files."""
    dtypes: Mapping[str, torch.dtype]
    tensor: Callable[[str], Tensor]


def local_folder(path: str, revision: str | None = None, with_code: bool = False) -> Path:
    """A model's folder on this machine; a hub id is downloaded, or found in the cache.

    Args:
        with_code: the repository's Python files, too.

    Raises:
        ValueError: neither a folder nor a readable hub id.
    """
    return model_folder(path, revision, [*_FILES, *(["*.py"] if with_code else [])])


def open_model(folder: Path) -> ModelFiles:
    """The tensors in the folder's safetensors files; ValueError for none or a damaged file."""
    places: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in model_files(folder):
        for name, entry in read_header(file).items():
            if entry.dtype not in TORCH_TYPES:
                raise ValueError(f"{file}: {name} is of type {entry.dtype}")
            places[name], shapes[name] = file, entry.shape
            dtypes[name] = TORCH_TYPES[entry.dtype]
    if not places:
        raise ValueError(f"{folder}: no safetensors files")

    def tensor(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return ModelFiles(shapes, dtypes, tensor)


def merged(base: ModelFiles, adapter: SavedAdapter | None, dtype: torch.dtype) -> ModelFiles:
    """The unquantised base with the adapter's products: W + alpha / r * B A, summed in float32.

    Without an adapter only the type changes.

    Raises:
        ValueError: the adapter changes a tensor that the base does not have, or of another shape.
    """
    state = adapter.state if adapter is not None else {}
    scale = adapter.lora.alpha / adapter.lora.r if adapter is not None else 0.0
    products: dict[str, tuple[Tensor, Tensor]] = {}
    for key in (key for key in state if ".lora_A." in key):
        a, b = state[key], state[key.replace(".lora_A.", ".lora_B.")]
        name, shape = key.removeprefix(_PREFIX).replace(".lora_A.", "."), (b.shape[0], a.shape[1])
        if base.shapes.get(name) != shape:
            found = base.shapes.get(name, "no such tensor")
            raise ValueError(f"the adapter changes {name} of shape {shape}; the base has {found}")
        products[name] = (a, b)

    def tensor(name: str) -> Tensor:
        weight = base.tensor(name)
        if name in products:
            a, b = products[name]
            weight = weight.float() + scale * (b.float() @ a.float())
        return cast_to(weight, dtype, name)

    return ModelFiles(base.shapes, dict.fromkeys(base.shapes, dtype), tensor)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and so on, as in configs."""
    return str(dtype).removeprefix("torch.")


def chosen_dtype(wanted: str, found: Iterable[torch.dtype], where: str) -> torch.dtype:
    """The type that `--dtype` names; for `keep` that of the tensors, if all have one."""
    if wanted != "keep":
        return getattr(torch, wanted)
    first, *others = sorted(set(found), key=str)
    if others:
        names = ", ".join(map(dtype_name, (first, *others)))
        raise ValueError(f"{where}: tensors of the types {names}; choose one with --dtype")
    return first


def cast_to(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The weight in another type; ValueError if a number is too large for it."""
    converted = weight.to(dtype)
    if not torch.isfinite(converted).all():
        raise ValueError(f"{name} is too large for {dtype}: choose another --dtype")
    return converted


def write_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    max_bytes: int,
) -> list[Path]:
    """Writes a model's tensors for `from_pretrained`: one model.safetensors, or more with an index.

    Args:
        shapes: name -> shape, in the order in which they are written.
        tensor: returns a tensor of that name and type.
        max_bytes: of a file; a single larger tensor gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    files: list[Path] = []
    places: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = folder / (several if len(groups) > 1 else "model.safetensors")
        write_file(file, {name: shapes[name] for name in names}, dtype, tensor)
        files.append(file)
        places |= dict.fromkeys(names, file.name)
    if len(files) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    return files


def write_file(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
) -> None:
    """One safetensors file; arguments as for `write_model`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name, shape in shapes.items():
            value = tensor(name).contiguous()
            assert (tuple(value.shape), value.dtype) == (shape, dtype), name
            stream.write(value.flatten().view(torch.uint8).numpy().data)
