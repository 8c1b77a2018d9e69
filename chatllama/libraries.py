"""How the libraries behave inside our commands."""

import warnings

import datasets
import huggingface_hub.constants
from transformers.utils import logging


def quiet_libraries() -> None:
    """No progress bars, usage telemetry or notes to library authors; warnings to users stay."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL counts its uses at start
    warnings.filterwarnings("ignore", category=FutureWarning)
