"""The words of `chatllama export`, and the options that they mean. Imports nothing heavy."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatllama.inference.options import GenerationRole


@dataclass(frozen=True)
class ExportOptions:
    """What to write."""

    role: GenerationRole | None = None
    """None: the policy if there is one, else the SFT model."""
    merged: bool = False
    reward: bool = False
    gguf: bool = False
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Of merged weights and of the GGUF file."""
    base_name: str | None = None
    """Hub id under which the base is published. None: what the config calls it."""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add(
        "--role",
        choices=("sft", "policy", "ema"),
        help="whose adapter (default: the newest of sft and policy)",
    )
    add("--merged", action="store_true", help="also the model with the adapter added to it")
    add("--reward", action="store_true", help="also the reward model (with --merged: merged, too)")
    add("--gguf", action="store_true", help="also for llama.cpp and Ollama (extra: gguf)")
    add(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of merged weights (default: the base's)",
    )
    add("--base-name", metavar="ID", help="hub id of the base (default: as in the config)")
    add("--out", type=Path, metavar="FOLDER", help="default: RUN/export")


def export_options(arguments: argparse.Namespace) -> ExportOptions:
    """What was typed, as options; folders are apart."""
    return ExportOptions(
        role=arguments.role,
        merged=arguments.merged,
        reward=arguments.reward,
        gguf=arguments.gguf,
        dtype=arguments.dtype,
        base_name=arguments.base_name,
    )
