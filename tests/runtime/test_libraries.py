"""What the libraries say inside our commands."""

import logging

import pytest

from chatllama.runtime.libraries import quiet_libraries


@pytest.mark.parametrize(
    ("name", "noise", "kept"),
    [
        ("accelerate.accelerator", "[RANK 0] Gradient accumulation steps mismatch: 1 ...",
         "Gradient clipping mismatch"),
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from float32",
         "Some matrices hidden dimension is not a multiple of 64"),
    ],
)  # fmt: skip
def test_warnings_that_bury_others_are_left_out(
    caplog: pytest.LogCaptureFixture, name: str, noise: str, kept: str
):
    quiet_libraries()
    logger = logging.getLogger(name)
    logger.warning(noise)
    logger.warning(kept)
    assert [record.getMessage() for record in caplog.records] == [kept]
