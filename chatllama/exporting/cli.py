"""The arguments of `chatllama export`. Imports nothing heavy."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatllama.inference.options import TRUST
from chatllama.runtime.declared_options import add_options, option


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write."""

    role: Literal["sft", "policy", "ema"] | None = option(
        None, "whose adapter (default: the newest of sft and policy)"
    )
    merged: bool = option(False, "also the model with the adapter added to it")
    reward: bool = option(False, "also the reward model (with --merged: merged, too)")
    gguf: bool = option(False, "also for llama.cpp and Ollama (extra: gguf)")
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = option(
        "keep", "of merged weights and of the GGUF file (default: the base's)"
    )
    base_name: str | None = option(
        None, "hub id of the base (default: as in the config)", metavar="ID"
    )
    trust_remote_code: bool = option(False, TRUST)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    add_options(parser, ExportOptions)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/export")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="of `chatllama export`: RUN/export/adapter")
    add("repository", metavar="USER/NAME", help="on the hub; made if there is none")
    add("--private", action="store_true", help="a new repository is not shown to others")
