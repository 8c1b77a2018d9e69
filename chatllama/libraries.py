"""How the libraries behave inside our commands."""

import warnings
from logging import LogRecord, getLogger

import datasets
import huggingface_hub.constants
from transformers.utils import logging


def quiet_libraries() -> None:
    """No progress bars, usage telemetry or notes to library authors; warnings to users stay."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL counts its uses at start
    warnings.filterwarnings("ignore", category=FutureWarning)
    getLogger("accelerate.accelerator").addFilter(_concerns_users)


def _concerns_users(record: LogRecord) -> bool:
    """False for a warning that every accumulating run under DeepSpeed would begin with.

    transformers' Trainer counts accumulation steps itself and tells accelerate of one; accelerate
    then takes DeepSpeed's number, which is the right one.
    """
    return "Gradient accumulation steps mismatch" not in record.getMessage()
