"""Safetensors files written tensor by tensor, so that one tensor is in memory at a time.

`safetensors.torch.save_file` wants all tensors of a file at once. The format: the header's length
(8 bytes, little endian), the header (JSON), the tensors' bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from chatllama.run_folder import write_json

TORCH_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}


def write_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], torch.Tensor],
    max_bytes: int,
) -> list[Path]:
    """The files that hold a model's tensors as `from_pretrained` finds them.

    One model.safetensors, or several with an index.

    Args:
        folder: where they go.
        shapes: name -> shape, in the order in which they are written.
        dtype: of all tensors.
        tensor: gives a tensor of that name and type.
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
    tensor: Callable[[str], torch.Tensor],
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
