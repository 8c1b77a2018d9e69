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
    for name in ("accelerate.accelerator", "bitsandbytes.autograd._functions"):
        getLogger(name).addFilter(_concerns_users)


def _concerns_users(record: LogRecord) -> bool:
    """False for two warnings that would only bury others.

    Every accumulating run under DeepSpeed would begin with the one: transformers' Trainer counts
    accumulation steps itself and tells accelerate of one; accelerate then takes DeepSpeed's number,
    which is the right one. Every product with an 8-bit matrix makes the other, unless its input is
    float16: it is rounded to 8 bits by way of that type.
    """
    unneeded = ("Gradient accumulation steps mismatch", "inputs will be cast from")
    return not any(text in record.getMessage() for text in unneeded)
