"""The figures in the heads of the shipped configs: the harness's, and close to the plan's."""

import config_headers
import pytest


@pytest.mark.parametrize("name", list(config_headers.RANKS))
def test_heads_are_within_five_percent_of_the_plan(name: str) -> None:
    written, planned = config_headers.written(name), config_headers.planned(name)
    assert written.keys() == planned.keys()
    off = {what: size / planned[what] - 1 for what, size in written.items()}
    assert all(abs(each) < 0.05 for each in off.values()), off


@pytest.mark.parametrize(("name", "most"), [("llama-7b-24gb", 20.5e9), ("llama-7b-nf4-12gb", 9e9)])
def test_7b_fits_its_gpu_in_every_stage(name: str, most: float) -> None:
    sizes = config_headers.written(name)
    assert len(sizes) == 5 and max(sizes.values()) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", list(config_headers.RANKS))
def test_heads_are_what_the_code_takes(name: str) -> None:
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    found = config_headers.block(config_headers.measured(name))
    file = config_headers.CONFIGS / f"{name}.yaml"
    assert found in file.read_text(encoding="utf-8"), (
        f"{found}: run python tests/config_headers.py --write {name}"
    )
