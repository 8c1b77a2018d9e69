import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatllama.runtime.files import new_folder


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_weights_are_as_readable_as_their_folder(tmp_path: Path, umask: int) -> None:
    """safetensors alone makes files that nobody else can read: `chmod` after every training."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "made") as beside:
            (beside / "inner").mkdir()
            for folder in (beside, beside / "inner"):
                save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
            (beside / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
