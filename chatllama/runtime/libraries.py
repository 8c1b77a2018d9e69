"""How the libraries behave inside our commands."""

import warnings
from logging import LogRecord, getLogger

import datasets
import huggingface_hub.constants
from transformers.utils import logging


def quiet_libraries() -> None:
    """Turns off progress bars, telemetry and warnings for library authors, not those for users."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL counts its uses at start
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("accelerate.accelerator", "bitsandbytes.autograd._functions"):
        getLogger(name).addFilter(_concerns_users)


def _concerns_users(record: LogRecord) -> bool:
    """False for two warnings without consequence.

    The first appears in every accumulating run under DeepSpeed: transformers' Trainer counts
    accumulation steps itself and gives accelerate one; accelerate then uses DeepSpeed's number,
    which is right. The second appears at every product with an 8-bit matrix whose input is not
    float16: the input is rounded to 8 bits by way of that type.
    """
    unneeded = ("Gradient accumulation steps mismatch", "inputs will be cast from")
    return not any(text in record.getMessage() for text in unneeded)
