"""A git-lfs pointer in the place of any file that is read is named, with the remedy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatllama.importing.gguf_file import GgufFile
from chatllama.importing.meta_params import read_params
from chatllama.importing.meta_shards import _open
from chatllama.model.adapters import load_adapter
from chatllama.model.llama_config import check_model_folder
from chatllama.model.safetensors_header import read_header
from chatllama.runtime.json_files import read_json
from chatllama.text.tokenizer import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DOORS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": read_header,
    "config.json": lambda file: check_model_folder(file.parent),
    "chatllama.json": read_json,
    "consolidated.00.pth": _open,
    "params.json": read_params,
    "model.gguf": GgufFile,
    "tokenizer.json": lambda file: load_tokenizer(file.parent),
    "tokenizer.model": lambda file: load_tokenizer(file.parent),
}


@pytest.mark.parametrize("name", DOORS)
def test_a_pointer_is_named_at_every_door(
    name: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    if "tokenizer" in name:
        shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: a git-lfs pointer.*: run git lfs pull"):
        DOORS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pointer_in_an_adapter_is_named(name: str, tmp_path: Path) -> None:
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, '
    (tmp_path / "adapter_config.json").write_text(config + '"target_modules": ["q_proj"]}')
    (tmp_path / "chatllama.json").write_text('{"base": "b"}')
    (tmp_path / "adapter_model.safetensors").write_text("")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: a git-lfs pointer"):
        load_adapter(tmp_path)
