"""Settings of CUDA that a process makes; they are flags and variables, so no GPU is needed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chatllama import cli
from chatllama.runtime.gpu import POOL_VARIABLES, any_kernels, choose_kernels, let_memory_grow
from trainers.stages.arguments import parse_stage_arguments


@pytest.fixture(autouse=True)
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process has them when it starts; put back at the end."""
    for name in (*POOL_VARIABLES, "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_s_attention_is_off_and_kernels_repeat_where_asked(deterministic: bool):
    choose_kernels(deterministic)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") is deterministic
    assert (os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1") is deterministic


@pytest.mark.parametrize("own", [False, True])
def test_a_program_that_opens_a_run_keeps_its_own_choice(own: bool):
    torch.use_deterministic_algorithms(own)
    choose_kernels()
    assert torch.are_deterministic_algorithms_enabled() is own
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("deterministic", [False, True])
def test_any_kernels_are_allowed_for_a_while(deterministic: bool):
    choose_kernels(deterministic)
    with pytest.raises(KeyError), any_kernels():
        assert not torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled() is deterministic


def through_a_stage(folder: Path) -> None:
    content = "backbone: {path: p}\nchat: {template: llama2}\nsft: {data: [{path: a.txt}]}\n"
    (folder / "c.yaml").write_text(f"run_dir: {folder}/run\n{content}")
    parse_stage_arguments("", [str(folder / "c.yaml")])


def through_a_command(folder: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])


DOORS = {
    "the function": lambda _: let_memory_grow(),
    "a stage": through_a_stage,
    "a command": through_a_command,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("own", [None, *POOL_VARIABLES])
def test_memory_grows_in_place_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str, own: str | None
):
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    DOORS[door](tmp_path)
    found = {name: os.environ[name] for name in POOL_VARIABLES if name in os.environ}
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert found == (expected if own is None else {own: "max_split_size_mb:128"})
