"""What the libraries say inside our commands."""

import logging

import pytest

from chatllama.libraries import quiet_libraries


def test_one_warning_of_accelerate_is_left_out(caplog: pytest.LogCaptureFixture):
    quiet_libraries()
    logger = logging.getLogger("accelerate.accelerator")
    logger.warning("[RANK 0] Gradient accumulation steps mismatch: 1 ...")
    logger.warning("Gradient clipping mismatch")
    assert [record.getMessage() for record in caplog.records] == ["Gradient clipping mismatch"]
