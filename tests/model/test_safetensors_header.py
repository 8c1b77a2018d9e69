"""Headers of weights that lie about lengths, places and other files are refused before reading."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatllama.model.fingerprint import fingerprint
from chatllama.model.safetensors_header import INDEX, model_files, read_header
from chatllama.model.weight_files import open_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    return path


def test_it_says_what_the_library_wrote(file: Path) -> None:
    header = read_header(file)
    found = {
        name: (entry.dtype, entry.shape, entry.end - entry.begin) for name, entry in header.items()
    }
    assert found == {"a": ("F32", (2, 3), 24), "b": ("BF16", (4,), 8)}
    assert file.read_bytes()[header["a"].begin : header["a"].end] == struct.pack("<6f", *[1] * 6)


def entry(**changes: Any) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + bytes(8)


LIES = {
    "length": struct.pack("<Q", 2**60) + b"{}", "negative length": b"\xff" * 8 + b"{}",
    "no length": b"", "short": b"\x02", "a list": struct.pack("<Q", 2) + b"[]",
    "no json": struct.pack("<Q", 4) + b"nope", "deep": struct.pack("<Q", 9000) + b"[" * 9000,
    "past the end": entry(data_offsets=[0, 2**40], shape=[2**38]),
    "all memory": entry(shape=[2**62, 2**62]), "backwards": entry(data_offsets=[8, 0]),
    "negative shape": entry(shape=[-2]), "negative offset": entry(data_offsets=[-8, 0]),
    "text": entry(shape="2"), "null": entry(data_offsets=None), "type": entry(dtype="F999"),
    "three": entry(data_offsets=[0, 4, 8]), "more dims": entry(shape=[1] * 5000),
    "nan": entry(shape=[float("nan")]), "too short": entry(shape=[3]), "number": entry(dtype=5),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_every_reader(file: Path, lie: str) -> None:
    assert len(read_header(file)) == 2
    file.write_bytes(LIES[lie])
    for read in (
        read_header,
        lambda file: fingerprint(file.parent),
        lambda f: open_model(f.parent),
    ):
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            read(file)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "[" * 100_000]
    + [f'{{"weight_map": {{"a": "{name}"}}}}' for name in
       ("../../etc/passwd", "/etc/passwd", "../model.safetensors", "", ".", "..", "config.json",
        "nothing.safetensors", "sub/model.safetensors", "x\\u0000.safetensors")],
)  # fmt: skip
def test_an_index_reaches_no_other_place(file: Path, content: str) -> None:
    file.rename(file.with_name("model-00001-of-00001.safetensors"))
    index = file.with_name(INDEX)
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert [path.name for path in model_files(file.parent)] == ["model-00001-of-00001.safetensors"]
    index.write_text(content)
    with pytest.raises(ValueError, match=r"safetensors"):
        model_files(file.parent)
    if "nothing" in content or "u0000" in content:
        assert fingerprint(file.parent) is None
    else:
        with pytest.raises(ValueError, match=r"index\.json"):
            fingerprint(file.parent)
