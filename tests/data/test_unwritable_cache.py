"""Caches that cannot be written: a message with the folder and the remedy, in every command."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatllama import cli
from chatllama.model.weight_files import local_folder
from chatllama.text.tokenizer import load_tokenizer
from data.caching import cached_map
from data.reading import source as reading
from data.reading.source import DataSource, read_source

SAMPLE = DataSource(path="data/samples/messages.jsonl")


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "datasets"


def kernels(folder: Path) -> Path:
    return Path("/proc/datasets")  # refused to root, too


PLACES = [a_file, below_a_file, kernels]


@pytest.mark.parametrize("place", PLACES)
def test_the_cache_of_data_sets_is_named(
    place: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    said = f"the cache of data sets, {folder}, cannot be written .*: set HF_HOME"
    with pytest.raises(ValueError, match=said):
        read_source(SAMPLE, "sft")
    with pytest.raises(ValueError, match=said):
        read_source(DataSource(path="someone/data", format="messages"), "sft")


@pytest.mark.usefixtures("data_cache")
def test_a_disk_that_is_full_in_the_middle_is_told_from_bad_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, _ = read_source(SAMPLE, "sft")
    said = r"cannot be written \(No space left on device\): set HF_HOME .* make room"

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(type(data), "map", full)
        with pytest.raises(ValueError, match=said):
            cached_map(data, dict, {})
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_rows", full)
        with pytest.raises(ValueError, match=said):
            read_source(DataSource(path="data/samples/alpaca.jsonl"), "sft")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device"),
              NotADirectoryError(20, "Not a directory")],
)  # fmt: skip
@pytest.mark.parametrize("load", [load_tokenizer, local_folder])
def test_the_hubs_cache_is_named(
    error: OSError, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    said = rf"someone/model: the hub's cache, .*, cannot be written \({error.strerror}\): set HF_H"
    with pytest.raises(ValueError, match=said):
        load("someone/model")


def test_a_folder_of_results_that_cannot_be_written_is_a_users_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer_dir: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}\nbackbone: {{path: {tiny_tokenizer_dir}}}\n")
    for place in PLACES:
        out = place(tmp_path) / "deeper"
        assert cli.main(["data", "check", str(config), "--out", str(out)]) == 2
        assert str(out.parent) in capsys.readouterr().err
