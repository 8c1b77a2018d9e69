"""Rate of reading and tokenising beside plain `datasets.map`, and memory of reading a large file.

    python benchmarks/data_tokenization.py TOKENIZER_FOLDER DATA_FILE [--records 20000] [--rounds 2]
    python benchmarks/data_tokenization.py TOKENIZER_FOLDER DATA_FILE --stream-mb 1000

DATA_FILE holds conversations in any format that chatllama reads; it is repeated (each copy with a
number of its own, so that nothing comes from a cache) until there are enough records. Every round
does everything once, on text of its own, so that ratios can be taken within a round. Nothing is
downloaded. Rows are printed as JSON: what was done, processes, seconds on the clock and of the
processors (of all processes; the figure to trust on a shared machine), tokens per processor second,
and the peak resident memory of this process and its largest child in MiB. Results of ours:
`benchmarks/results/data.md`.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource
from chatllama.text.tokenizer import load_tokenizer
from data.caching import num_workers
from data.reading.source import read_source
from data.tokenize import tokenize


def main() -> None:
    """Prints one line of JSON per measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stream-mb", type=int, help="read a file of this size instead")
    parser.add_argument("--max-length", type=int, default=2048)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        # The attribute exists at run time; `datasets` does not declare it.
        cast(Any, datasets).config.HF_DATASETS_CACHE = Path(folder) / "cache"
        if arguments.stream_mb:
            _stream(arguments, Path(folder))
        else:
            _tokenize(arguments, Path(folder))


def _records(source: Path, number: int) -> Iterator[list[dict[str, str]]]:
    """The conversations of a file again and again, each time with another number."""
    data, _ = read_source(DataSource(path=str(source)), "sft")
    rows: list[list[dict[str, str]]] = data["messages"][:]
    while True:
        for messages in rows:
            number += 1
            first = {**messages[0], "content": f"{number}: {messages[0]['content']}"}
            yield [first, *messages[1:]]


def _write(source: Path, file: Path, enough: Callable[[int, int], bool], first: int = 0) -> None:
    """Conversations as jsonl until `enough(number, bytes)`."""
    size = 0
    with file.open("w", encoding="utf-8") as stream:
        for number, messages in enumerate(_records(source, first)):
            if enough(number, size):
                return
            line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            size += len(line.encode())
            stream.write(line)


def _stream(arguments: argparse.Namespace, folder: Path) -> None:
    file = folder / "large.jsonl"
    limit = arguments.stream_mb * 2**20
    _write(arguments.data, file, lambda _, size: size >= limit)
    before, watch = _peak(), _Watch()
    data, _ = read_source(DataSource(path=str(file)), "sft")
    row = {
        "what": f"read {arguments.stream_mb} MiB of jsonl",
        "records": len(data),
        **watch.seconds(),
        "mib_per_cpu_second": round(arguments.stream_mb / watch.seconds()["cpu_seconds"], 1),
        "peak_mib_before": before,
        "peak_mib": _peak(),
    }
    print(json.dumps(row), flush=True)


def _tokenize(arguments: argparse.Namespace, folder: Path) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)
    chat, length = ChatSection(template="llama2"), arguments.max_length
    for number in range(1, arguments.rounds + 1):
        file = folder / f"data-{number}.jsonl"
        first = number * 10**6
        _write(arguments.data, file, lambda count, _: count >= arguments.records, first)
        watch = _Watch()
        data, _ = read_source(DataSource(path=str(file)), "sft")
        _print(number, "read", watch, None, None)
        workers = num_workers(len(data))
        for what in ("ours: chat layout, loss mask, exact ids", "ours again, from the cache"):
            watch = _Watch()
            ours, _ = tokenize(data, "sft", tokenizer, chat, length)
            _print(number, what, watch, None if "cache" in what else ours, workers)
        for batched in (False, True):
            watch = _Watch()
            plain = data.map(
                _plain,
                batched=batched,
                remove_columns=data.column_names,
                fn_kwargs={"tokenizer": tokenizer, "max_length": length},
                num_proc=workers,
            )
            what = (
                f"datasets.map, fast tokenizer on joined text, {'batched' if batched else 'by row'}"
            )
            _print(number, what, watch, plain, workers)


def _plain(
    rows: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> dict[str, Any]:
    """Ids of the joined turns, without layout or mask."""
    messages = rows["messages"]
    if messages and isinstance(messages[0], dict):
        text: Any = "\n".join(turn["content"] for turn in messages)
    else:
        text = ["\n".join(turn["content"] for turn in turns) for turns in messages]
    encoded = tokenizer(text, truncation=True, max_length=max_length)
    return {"input_ids": encoded["input_ids"]}


class _Watch:
    """Time since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), self._cpu()

    def seconds(self) -> dict[str, float]:
        """On the clock, and of the processors: this process and its finished children."""
        clock, cpu = time.perf_counter() - self._begin[0], self._cpu() - self._begin[1]
        return {"seconds": round(clock, 2), "cpu_seconds": round(cpu, 2)}

    @staticmethod
    def _cpu() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system


def _print(
    number: int, what: str, watch: _Watch, made: datasets.Dataset | None, workers: int | None
) -> None:
    seconds = watch.seconds()
    tokens = None if made is None else sum(map(len, made["input_ids"][:]))
    row = {
        "round": number,
        "what": what,
        "processes": workers or 1,
        **seconds,
        "tokens": tokens,
        "tokens_per_cpu_second": tokens and round(tokens / max(seconds["cpu_seconds"], 0.01)),
        "peak_mib": _peak(),
    }
    print(json.dumps(row), flush=True)


def _peak() -> int:
    """Peak resident memory of this process or its largest child, MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,
                                                           resource.RUSAGE_CHILDREN)]  # fmt: skip
    return max(peaks) // unit


if __name__ == "__main__":
    main()
