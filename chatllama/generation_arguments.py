"""The words of `chatllama generate`, and the options that they mean. Imports nothing heavy."""

import argparse
from pathlib import Path

from chatllama.generation_plan import Options
from chatllama.inference_weights import add_weights_arguments


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add("prompts", metavar="PROMPT", nargs="*", help="what to answer (default: lines of stdin)")
    add(
        "--file",
        type=Path,
        metavar="F",
        help="prompts: .jsonl with `prompt` or `messages`, or .txt, one a line",
    )
    add(
        "--role",
        choices=("base", "sft", "policy", "ema"),
        help="who answers (default: the newest of sft and policy)",
    )
    add("--temperature", type=float, metavar="T", help="0: the likeliest token")
    add("--top-p", type=float, metavar="P", help="1: all tokens")
    add("--top-k", type=int, metavar="K", help="0: all tokens")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="answers at a time; changes answers by rounding only",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the decode step: a minute or so before the first answer, then for a GPU and "
        "many prompts; changes answers by rounding only",
    )
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="ends an answer and is not in it; may be given several times",
    )
    add("--n", type=int, default=1, metavar="N", help="answers to each prompt")
    add(
        "--best-of",
        type=int,
        metavar="N",
        help="of N samples keep the one that the reward model likes best",
    )
    add("--token-ids", action="store_true", help="write the sampled token ids, too")
    add(
        "--logprobs",
        action="store_true",
        help="write the tokens' log-probabilities, too, at the sampling temperature (1 if it is 0)",
    )
    add_weights_arguments(parser)
    add("--out", type=Path, metavar="F.jsonl", help="write here; an interrupted run is continued")
    parser.epilog = "Sampling settings that are left out are those of the run's `generation`."


def generate_options(arguments: argparse.Namespace) -> Options:
    """What was typed, as options; prompts and files are apart."""
    return Options(
        role=arguments.role,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        compile=arguments.compile,
        seed=arguments.seed,
        stops=tuple(arguments.stop),
        num_samples=arguments.n,
        best_of=arguments.best_of,
        token_ids=arguments.token_ids,
        logprobs=arguments.logprobs,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )
