"""The words of `chatllama generate`, and the options that they mean. Imports nothing heavy."""

import argparse
from pathlib import Path
from typing import Any

from chatllama.inference.options import Options


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


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add(
        "--translation",
        required=True,
        metavar="FILE",
        help="pairs in any format, or two aligned files without their endings (news for news.de "
        "and news.en)",
    )
    add(
        "--languages",
        nargs=2,
        required=True,
        metavar=("FROM", "TO"),
        help="language codes, such as de en",
    )
    add("--role", choices=("base", "sft", "policy", "ema"), help="who translates (default: newest)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer")
    add("--batch-size", type=int, metavar="N", help="sentences at a time")
    add("--limit", type=int, metavar="N", help="the first N sentences only")
    add_weights_arguments(parser)
    parser.epilog = "Answers and scores go to RUN/translation; what was interrupted is continued."


def eval_options(arguments: argparse.Namespace) -> Options:
    """The likeliest translation, as the arguments say."""
    return Options(
        role=arguments.role,
        temperature=0.0,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --dtype and --quantization."""
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=types, help="of the weights (default: the config's)")
    parser.add_argument(
        "--quantization",
        choices=("none", "int8", "nf4"),
        help="of the frozen weights (default: the config's; extra: bitsandbytes)",
    )


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what can be typed."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--role",
        choices=("base", "sft", "policy", "ema"),
        help="who answers (default: the newest that is there)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9, help="1: all tokens")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: the config's)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the config's)")
    parser.add_argument("--seed", type=int, help="for answers that can be repeated")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="ends an answer and is not in it; may be given several times",
    )
    add_weights_arguments(parser)


def chat_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was typed, as keyword arguments of `chat.chat`; the run is apart."""
    return {
        "role": arguments.role,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "max_new_tokens": arguments.max_new_tokens,
        "system": arguments.system,
        "seed": arguments.seed,
        "stops": tuple(arguments.stop),
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
    }
