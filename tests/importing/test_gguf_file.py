"""Headers of GGUF files that are cut off, damaged or hostile: refused at once, with the reason."""

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import TinyGguf

from chatllama.importing.gguf_file import GgufFile

MAGIC = b"GGUF"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    TinyGguf().write(path)
    return path.read_bytes()


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**62
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "another format": (b"PK\x03\x04 and so on, for a while", "does not begin with `GGUF`"),
    "magic alone": (MAGIC, "its header does not end within 4 bytes"),
    "version 1": (header(version=1), "GGUF version 1; 2 and 3 in little-endian order are read"),
    "big-endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
    "tensors": (header(tensors=HUGE) + bytes(99), f"{HUGE:,} entries at byte 8"),
    "keys": (header(keys=HUGE) + bytes(99), f"{HUGE:,} entries at byte 16"),
    "key": (header(keys=1) + struct.pack("<Q", HUGE) + bytes(99), "does not end within"),
    "no UTF-8": (header(keys=1) + text(b"\xff\xfe") + bytes(20), "is not UTF-8"),
    "type": (header(keys=1) + text(b"a") + struct.pack("<I", 77) + bytes(9), "is of type 77"),
    "list": (
        header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(9),
        f"{HUGE:,} entries",
    ),
    "list of texts": (
        header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(9),
        f"{HUGE:,} entries",
    ),
    "list of lists": (
        header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(30),
        "a list before byte 41 is of type 9",
    ),
    "key twice": (header(keys=2) + 2 * (text(b"a") + struct.pack("<IB", 7, 1)), "a occurs twice"),
    "alignment": (
        header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 3),
        "general.alignment is 3, no power of two",
    ),
    "dimensions": (header(1) + tensor(b"t", (1,) * 9) + bytes(99), "t has 9 dimensions"),
    "no rows": (header(1) + tensor(b"t", (4, 0)) + bytes(99), "t of type F32 has shape (0, 4)"),
    "overflow": (header(1) + tensor(b"t", (2**32, 2**32)) + bytes(99), "damaged: t ends"),
    "offset": (header(1) + tensor(b"t", (4,), offset=HUGE) + bytes(99), "damaged: t ends"),
    "tensor type": (header(1) + tensor(b"t", (4,), 999) + bytes(99), "is of type 999"),
    "blocks": (header(1) + tensor(b"t", (33,), 2) + bytes(99), "t of type Q4_0 has shape (33,)"),
    "twice": (header(2) + 2 * tensor(b"t", (4,)) + bytes(99), "tensor t occurs twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_has_a_reason(name: str, tmp_path: Path) -> None:
    data, message = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        GgufFile(path)
    assert message in str(caught.value) and str(path) in str(caught.value), caught.value
    assert time.process_time() - began < 0.5


def cut(luck: random.Random, data: bytes) -> bytes:
    return data[: luck.randrange(len(data))]


def flipped(luck: random.Random, data: bytes) -> bytes:
    at = luck.randrange(20_000)
    return data[:at] + bytes([luck.randrange(256)]) + data[at + 1 :]


def doubled(luck: random.Random, data: bytes) -> bytes:
    at, size = luck.randrange(9_000), luck.randrange(1, 40)
    return data[: at + size] + data[at:]


@pytest.mark.parametrize("change", [cut, flipped, doubled])
def test_any_damage_is_found_or_harmless(
    change: Callable[[random.Random, bytes], bytes], whole: bytes, tmp_path: Path
) -> None:
    luck, path, refused = random.Random(4), tmp_path / "damaged.gguf", 0
    for _ in range(20):
        path.write_bytes(change(luck, whole))
        try:
            GgufFile(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > (19 if change is cut else 1)


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 0.1)
    writer.add_array("texts", ["a", "日本", ""])
    writer.add_array("floats", [0.5, -2.0])
    writer.add_array("flags", [True, False])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    for bits in (8, 16, 32, 64):
        assert file.metadata[f"u{bits}"] == 2**bits - 1
        assert file.metadata[f"i{bits}"] == -(2 ** (bits - 1))
    assert (file.metadata["f32"], file.metadata["f64"]) == (1e-5, 0.1)
    assert file.array("texts", str) == ["a", "日本", ""]
    assert file.metadata["floats"] == [0.5, -2.0] and file.metadata["flags"] == [True, False]
    assert file.tensor("t").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.rows("t", 1, 9).tolist() == [[3, 4, 5]]
