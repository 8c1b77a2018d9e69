"""The headers of a folder's safetensors files, checked before anything is allocated by them.

The format: the header's length (8 bytes, little endian), the header (JSON), the tensors' bytes.
Imports no torch; tensors are read by the library (`weight_files.py`).
"""

import math
import stat
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from chatllama.runtime.json_files import read_json, refuse_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000
"""The library's own limit."""
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8,
    "BOOL": 8,
}  # fmt: skip
_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(TypedDict):
    dtype: str
    shape: Annotated[list[_Size], Field(max_length=16)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


class _Index(TypedDict):
    weight_map: dict[str, str]


_HEADER = TypeAdapter(dict[str, Any])
_ENTRIES = TypeAdapter(dict[str, _Entry])


class TensorEntry(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """F32, BF16 and so on."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int
    """Byte behind the last one."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor in a safetensors file, in the file's order.

    Raises:
        ValueError: the file is damaged: entries that are not those of a safetensors file, or that
            reach beyond its end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER_BYTES, found.st_size - 8):
            refuse_pointer(path)
            raise ValueError(f"{path} is damaged: no safetensors header")
        content = file.read(length)
    try:
        header = _HEADER.validate_json(content, strict=True)
        header.pop("__metadata__", None)
        entries = _ENTRIES.validate_python(header, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path} is damaged: no safetensors header ({place} {first['msg']})"
        ) from None
    tensors: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = _BITS.get(entry["dtype"])
        if bits is None:
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}, which is not read here")
        if end - begin != math.prod(entry["shape"]) * bits // 8 or end > found.st_size:
            raise ValueError(
                f"{path} is damaged: {name} of shape {tuple(entry['shape'])} does not lie in the "
                f"bytes {begin} to {end} of a file of {found.st_size}"
            )
        tensors[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]), begin, end)
    return tensors


def read_index(path: Path) -> list[Path]:
    """The files that an index of shards names, which may be missing; ValueError for other places.

    A name is that of a safetensors file beside the index, so that no index reaches outside.
    """
    names = sorted(set(read_json(path, _Index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: {name!r} is not the name of a .safetensors file beside it")
    return [path.with_name(name) for name in names]


def model_files(folder: Path) -> list[Path]:
    """The files from which transformers loads the model in a folder; none: no safetensors there.

    Raises:
        ValueError: the index is damaged or names a file that is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    files = read_index(folder / INDEX)
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {INDEX} names")
    return files
