"""Meta's consolidated.NN.pth files, opened without reading them, and their tensors put together.

Every tensor is as Meta stores it; `hugging_face.py` reorders rows.
"""

import pickle
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatllama.importing.meta_params import MetaParams
from chatllama.runtime.json_files import refuse_pointer

MAX_SHARDS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Computed anew from rope_theta; rounded to half precision in some files.
ROPE_SUFFIX, ROPE_TOLERANCE = "rope.freqs", 0.02
# fairscale: a column-parallel layer holds rows of its matrix, a row-parallel one columns.
ROWS, COLUMNS = 0, 1
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"


@dataclass(frozen=True)
class Layout:
    """How a tensor is split over the files."""

    shape: tuple[int, ...]
    """Of the whole."""
    axis: int | None
    """Along which it is split; None: every file has all of it."""

    def local(self, num_shards: int) -> tuple[int, ...] | None:
        """Shape in each file; None where it cannot be split into so many."""
        if self.axis is None:
            return self.shape
        whole, rest = divmod(self.shape[self.axis], num_shards)
        local = (*self.shape[: self.axis], whole, *self.shape[self.axis + 1 :])
        return None if rest else local


class MetaShards:
    """The tensors of a checkpoint with consolidated.00.pth and so on, read one at a time.

    `vocab_size` is that of its tokenizer. Without output.weight in any file the model is `tied`:
    the embedding is its LM head, as in Llama 3.2 1B and 3B.

    Raises:
        ValueError: a file is missing, cut off, or does not fit params.json.
    """

    def __init__(self, folder: Path, params: MetaParams, vocab_size: int) -> None:
        self.files = shard_files(folder)
        self._shards = [_open(file) for file in self.files]
        self.params = params
        self._check_count()
        self.ffn_dim = params.ffn_dim() or self._rows("layers.0.feed_forward.w1.weight")
        self.vocab_size = params.vocab_size or vocab_size
        self.tied = not any(_HEAD in shard for shard in self._shards)
        self.parts = self._expected()
        self._check_tensors(folder)
        self.dtypes = {tensor.dtype for tensor in self._used().values()}
        if vocab_size > self.vocab_size:
            tokens = f"{vocab_size} tokens, the model {self.vocab_size}"
            raise ValueError(f"{folder}: the tokenizer has {tokens}")

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in the type of the files."""
        pieces, axis = [shard[name] for shard in self._shards], self.parts[name].axis
        return pieces[0] if axis is None or len(pieces) == 1 else torch.cat(pieces, dim=axis)

    def _rows(self, name: str) -> int:
        """Rows of a column-parallel matrix over all files."""
        return sum(_get(s, name, f).shape[0] for s, f in zip(self._shards, self.files, strict=True))

    def _check_count(self) -> None:
        """Raises ValueError unless all files of the checkpoint are there."""
        folder, first, dim = self.files[0].parent, self.files[0], self.params.dim
        channels = _get(self._shards[0], "norm.weight", first).shape[0]
        if channels != dim:
            raise ValueError(
                f"{folder}: dim {dim} in params.json, {channels} channels in norm.weight"
            )
        name = "layers.0.attention.wq.weight"
        rows, own = self._rows(name), _get(self._shards[0], name, first).shape[0]
        if rows != dim and dim % own == 0:
            raise ValueError(
                f"{folder}: {len(self.files)} of {dim // own} files: {name} has {own} rows in "
                f"{first.name}, of {dim} in all; consolidated.00.pth to "
                f"consolidated.{dim // own - 1:02d}.pth are needed"
            )

    def _expected(self) -> dict[str, Layout]:
        """Name -> layout of every tensor that a model of these parameters has."""
        params, ffn = self.params, self.ffn_dim
        dim, kv_dim = params.dim, params.n_kv_heads * params.head_dim
        layer = {
            "attention.wq.weight": Layout((dim, dim), ROWS),
            "attention.wk.weight": Layout((kv_dim, dim), ROWS),
            "attention.wv.weight": Layout((kv_dim, dim), ROWS),
            "attention.wo.weight": Layout((dim, dim), COLUMNS),
            "feed_forward.w1.weight": Layout((ffn, dim), ROWS),
            "feed_forward.w2.weight": Layout((dim, ffn), COLUMNS),
            "feed_forward.w3.weight": Layout((ffn, dim), ROWS),
            "attention_norm.weight": Layout((dim,), None),
            "ffn_norm.weight": Layout((dim,), None),
        }
        # LLaMA-1 and LLaMA-2 split the embedding by channels, LLaMA-3 by tokens.
        by_channels = _get(self._shards[0], _EMBEDDING, self.files[0]).shape[-1] < dim
        parts = {_EMBEDDING: Layout((self.vocab_size, dim), COLUMNS if by_channels else ROWS)}
        for number in range(params.n_layers):
            parts |= {f"layers.{number}.{name}": layout for name, layout in layer.items()}
        parts["norm.weight"] = Layout((dim,), None)
        if not self.tied:
            parts[_HEAD] = Layout((self.vocab_size, dim), ROWS)
        return parts

    def _check_tensors(self, folder: Path) -> None:
        """Raises ValueError unless every file holds its part of every tensor, and nothing else."""
        for file, shard in zip(self.files, self._shards, strict=True):
            ropes = [name for name in shard if name.endswith(ROPE_SUFFIX)]
            if extra := [name for name in shard if name not in self.parts and name not in ropes]:
                raise ValueError(
                    f"{file}: {len(extra)} tensors that params.json (n_layers "
                    f"{self.params.n_layers}) has no place for, such as {extra[0]}"
                )
            for name, part in self.parts.items():
                found, local = tuple(_get(shard, name, file).shape), part.local(len(self.files))
                if found != local:
                    raise ValueError(
                        f"{file}: {name} has shape {found}; params.json and tokenizer ask for "
                        f"{local or part.shape}, in {len(self.files)} files"
                    )
                if part.axis is None and not torch.equal(shard[name], self._shards[0][name]):
                    raise ValueError(
                        f"{file}: {name} differs from that of {self.files[0].name}; are these "
                        "files of one checkpoint?"
                    )
            for name in ropes:
                self._check_rope(file, shard[name])
        for name, tensor in self._used().items():
            if tensor.dtype not in DTYPES:
                known = ", ".join(map(str, DTYPES))
                raise ValueError(f"{folder}: {name} is {tensor.dtype}; known: {known}")

    def _used(self) -> dict[str, Tensor]:
        return {f"{n} of {i}": s[n] for i, s in enumerate(self._shards) for n in self.parts}

    def _check_rope(self, file: Path, found: Tensor) -> None:
        """Raises ValueError unless stored rotation frequencies are those of rope_theta."""
        theta, head_dim = self.params.rope_theta, self.params.head_dim
        expected = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        near = partial(torch.allclose, rtol=ROPE_TOLERANCE, atol=1e-6)
        if found.shape != expected.shape or not near(found.double(), expected):
            raise ValueError(
                f"{file}: its {ROPE_SUFFIX} are not those of rope_theta {theta:g} and head size "
                f"{head_dim} in params.json"
            )


def shard_files(folder: Path) -> list[Path]:
    """The consolidated files, in order; ValueError for none, a gap, or too many."""
    found = {
        int(match[1]): path
        for path in sorted(folder.iterdir())
        if (match := re.fullmatch(r"consolidated\.(\d\d)\.pth", path.name))
    }
    if not found:
        raise ValueError(f"{folder}: no consolidated.00.pth; is this Meta's checkpoint?")
    if missing := [n for n in range(max(found) + 1) if n not in found]:
        names = ", ".join(f"consolidated.{n:02d}.pth" for n in missing)
        there = ", ".join(path.name for path in found.values())
        raise ValueError(f"{folder}: {names} missing; there: {there}")
    if len(found) > MAX_SHARDS:
        raise ValueError(f"{folder}: {len(found)} files; a LLaMA has at most {MAX_SHARDS}")
    return list(found.values())


def _open(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, memory-mapped; no code of the file is run."""
    refuse_pointer(file)
    try:
        content: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        about = "holds other things than tensors and is not opened"
        raise ValueError(f"{file}: {about}: {error}") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{file}: cut off, damaged, or no torch file: {first}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{file}: expected named tensors")
    return content


def _get(shard: dict[str, Tensor], name: str, file: Path) -> Tensor:
    if name not in shard:
        raise ValueError(f"{file}: lacks {name}, which params.json implies")
    if not shard[name].dim():
        raise ValueError(f"{file}: {name} is a single number")
    return shard[name]
