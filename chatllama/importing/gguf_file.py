"""A GGUF file: its metadata, checked against the file's size, and its tensors, read one by one.

The header is read here and not by the `gguf` package, which builds an object for every token and
trusts every length. The package dequantises. Needs the extra `gguf`.

Source of the format: docs/gguf.md of ggml-org/ggml.
"""

import mmap
import struct
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from chatllama.runtime.json_files import refuse_pointer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
ROWS_AT_ONCE = 4096
"""Rows that are dequantised together, so that their float32 copy is small."""
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}


class _Damaged(Exception):
    """The header ends early or holds what no GGUF file holds; the message says what."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in the file."""

    shape: tuple[int, ...]
    """As in torch: rows first."""
    kind: "GGMLQuantizationType"
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""


class GgufFile:
    """A GGUF file that is whole.

    Raises:
        ValueError: no GGUF file, damaged or cut off, of another version or byte order, one of
            several files, or a tensor of a type that the `gguf` package does not dequantise.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ValueError("GGUF files need the extra: pip install 'chatllama[gguf]'") from error
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ValueError(f"{path}: cannot be read: {error}") from error
        self._package, self._at = gguf, 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._read_header()
        except _Damaged as error:
            refuse_pointer(path)
            raise ValueError(f"{path}: {error}") from None
        if (parts := self.number("split.count", 1)) > 1:
            raise ValueError(
                f"{path}: one of {parts} files of a model; put them together first with "
                "llama.cpp's `llama-gguf-split --merge`"
            )
        self._check_kinds()

    def text(self, key: str, default: str | None = None) -> str | None:
        """The text at a key; ValueError for something else."""
        value = self.metadata.get(key, default)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.path}: {key} must be a text, not {value!r:.80}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The yes or no at a key; ValueError for something else."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key} must be true or false, not {value!r:.80}")
        return value

    def number(self, key: str, default: Any = None, *, whole: bool = True) -> Any:
        """The number above 0 at a key; ValueError for something else, or nothing and no default."""
        if key not in self.metadata:
            if default is None:
                raise ValueError(f"{self.path}: no {key}")
            return default
        value = self.metadata[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.path}: {key} must be a number, not {value!r:.80}")
        if not (isfinite(value) and value > 0) or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{self.path}: {key} must be {kind} above 0, not {value!r}")
        return value

    def index(self, key: str, below: int) -> int | None:
        """A token's id at a key, None where there is none; ValueError beyond the vocabulary."""
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value < below):
            raise ValueError(f"{self.path}: {key} is {value!r:.80}; the file has {below} tokens")
        return value

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        """The list at a key, of one kind of value; ValueError for another kind or length."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or (value and not isinstance(value[0], kind)):
            raise ValueError(f"{self.path}: {key} is missing, or no list of {kind.__name__}")
        if length is not None and len(value) != length:
            raise ValueError(f"{self.path}: {key} has {len(value)} entries, expected {length}")
        return value

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, float32."""
        stored = self.tensors[name]
        count = prod(stored.shape[:-1])
        result = torch.empty(count, stored.shape[-1])
        for start in range(0, count, ROWS_AT_ONCE):
            result[start : start + ROWS_AT_ONCE] = self.rows(name, start, ROWS_AT_ONCE)
        return result.view(stored.shape)

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """At most `count` rows of a tensor, dequantised to float32."""
        stored = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, stored.size, stored.offset)
        part = raw.reshape(prod(stored.shape[:-1]), -1)[start : start + count]
        values = self._package.dequantize(np.ascontiguousarray(part), stored.kind)
        return torch.from_numpy(np.array(values, np.float32))

    def _read_header(self) -> None:
        if self._take(4) != b"GGUF":
            raise _Damaged("no GGUF file: it does not begin with `GGUF`")
        version = self._scalar("<u4")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise _Damaged(f"GGUF version {version}; {known} in little-endian order are read")
        count, num_keys = self._count("<u8", 24), self._count("<u8", 12)
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise _Damaged(f"{key} occurs twice")
            self.metadata[key] = self._value(self._scalar("<u4"))
        listed: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(count):
            name, dimensions = self._string(), self._scalar("<u4")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise _Damaged(f"tensor {name} has {dimensions} dimensions")
            shape = tuple(self._scalar("<u8") for _ in range(dimensions))
            listed.append((name, shape[::-1], self._scalar("<u4"), self._scalar("<u8")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment is {alignment!r}, no power of two")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in listed:
            if name in self.tensors:
                raise _Damaged(f"tensor {name} occurs twice")
            self.tensors[name] = self._placed(name, shape, kind, start + offset)

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        try:
            known = self._package.GGMLQuantizationType(kind)
        except ValueError:
            raise _Damaged(f"tensor {name} is of type {kind}, which is not known") from None
        per_block, block_bytes = self._package.GGML_QUANT_SIZES[known]
        if not all(shape) or shape[-1] % per_block:
            raise _Damaged(f"tensor {name} of type {known.name} has shape {shape}")
        size = prod(shape) // per_block * block_bytes
        if offset + size > len(self._bytes):
            raise _Damaged(
                f"cut off or damaged: {name} ends at byte {offset + size:,}, the file has "
                f"{len(self._bytes):,}"
            )
        return StoredTensor(shape, known, offset, size)

    def _check_kinds(self) -> None:
        """Raises ValueError for a type of tensor that the package cannot dequantise."""
        for kind, name in {stored.kind: name for name, stored in self.tensors.items()}.items():
            _, block_bytes = self._package.GGML_QUANT_SIZES[kind]
            try:
                self._package.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {name} is of type {kind.name}, which is not dequantised"
                ) from None

    def _take(self, count: int) -> bytes:
        begin, self._at = self._at, self._at + count
        if self._at > len(self._bytes):
            raise _Damaged(f"cut off or damaged: its header does not end within {begin:,} bytes")
        return self._bytes[begin : self._at]

    def _scalar(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
        return float(str(value)) if kind == "<f4" else value.item()  # 1e-05, not 9.99999974e-06

    def _count(self, kind: str, least: int) -> int:
        """A number of things that take at least so many bytes each, within the file."""
        count = self._scalar(kind)
        if count * least > len(self._bytes) - self._at:
            raise _Damaged(f"cut off or damaged: {count:,} entries at byte {self._at - 8:,}")
        return count

    def _string(self) -> str:
        raw = self._take(struct.unpack("<Q", self._take(8))[0])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Damaged(f"a text before byte {self._at:,} is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._scalar("<u4"))
        if kind not in _NUMBERS:
            raise _Damaged(f"a value before byte {self._at:,} is of type {kind}")
        value = self._scalar(_NUMBERS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self, kind: int) -> list[Any]:
        if kind == _STRING:
            return [self._string() for _ in range(self._count("<u8", 8))]
        if kind not in _NUMBERS:
            raise _Damaged(f"a list before byte {self._at:,} is of type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        count = self._count("<u8", dtype.itemsize)
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        return [bool(value) for value in values] if kind == _BOOL else values
