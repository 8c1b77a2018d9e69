"""The form in which a backbone is loaded for answering: words of the command line, their meaning.

Training takes it from the config alone. Imports nothing heavy.
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config import BackboneSection, Config


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --dtype and --quantization."""
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=types, help="of the weights (default: the config's)")
    parser.add_argument(
        "--quantization",
        choices=("none", "int8", "nf4"),
        help="of the frozen weights (default: the config's; extra: bitsandbytes)",
    )


def with_weights(cfg: "Config", dtype: str | None, quantization: str | None) -> "Config":
    """The config with the backbone's weights in another form, for inference.

    float16 is for inference only: its gradients would underflow, so no YAML may ask for it.

    Args:
        cfg: of a run.
        dtype: float32, bfloat16 or float16. None: as it is.
        quantization: none, int8 or nf4. None: as it is.
    """
    changes = {"dtype": dtype, "quantization": quantization}
    wanted = {key: value for key, value in changes.items() if value is not None}
    return cfg.model_copy(update={"backbone": cfg.backbone.model_copy(update=wanted)})


def without_training_kernels(section: "BackboneSection") -> "BackboneSection":
    """The section without what only training uses, so that any machine can open any run."""
    changes: dict[str, object] = {"liger_kernel": False}
    if section.attn_implementation == "varlen":
        changes["attn_implementation"] = "sdpa"  # which it is where rows are not packed
    return section.model_copy(update=changes)
