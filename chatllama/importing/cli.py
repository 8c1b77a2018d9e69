"""Arguments of `chatllama import`."""

import argparse
from pathlib import Path


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares those of `import`."""
    add = parser.add_argument
    about = (
        "Meta's folder (params.json, consolidated.NN.pth and, there or one above, tokenizer.model) "
        "or a LLaMA's GGUF file (extra: gguf), whose weights are dequantised"
    )
    add("source", metavar="FOLDER|FILE.gguf", type=Path, help=about)
    add(
        "--out", type=Path, metavar="FOLDER", help="new folder (default: the source's name and -hf)"
    )
    types = ("keep", "float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="keep", help="type of the weights (default: keep)")
    about = "longest text, in tokens (default: the source's; Meta's files do not say: 2048)"
    add("--max-positions", type=int, metavar="N", help=about)
