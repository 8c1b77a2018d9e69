"""Rate of reading and tokenising beside plain `datasets.map`, and memory of reading a large file.

    python benchmarks/data_tokenization.py TOKENIZER_FOLDER DATA_FILE [--records 20000]
    python benchmarks/data_tokenization.py TOKENIZER_FOLDER DATA_FILE --stream-mb 1000

DATA_FILE holds conversations in any format that chatllama reads; it is repeated (each copy with a
number of its own, so that nothing comes from a cache) until there are enough records. Nothing is
downloaded. Rows are printed as JSON: what was done, processes, seconds, tokens a second, and the
peak resident memory of this process and its largest child in MiB.
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

from chatllama.config import ChatSection, DataSource
from chatllama.tokenizer import load_tokenizer
from data.readers import read_source
from data.sft import tokenize_conversations
from data.workers import num_workers


def main() -> None:
    """Prints one line of JSON per measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--records", type=int, default=20_000)
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


def _records(source: Path) -> Iterator[list[dict[str, str]]]:
    """The conversations of a file again and again, each time with another number."""
    data, _ = read_source(DataSource(path=str(source)), "sft")
    rows: list[list[dict[str, str]]] = data["messages"][:]
    number = 0
    while True:
        for messages in rows:
            number += 1
            first = {**messages[0], "content": f"{number}: {messages[0]['content']}"}
            yield [first, *messages[1:]]


def _write(source: Path, file: Path, enough: Callable[[int, int], bool]) -> None:
    """Conversations as jsonl until `enough(number, bytes)`."""
    size = 0
    with file.open("w", encoding="utf-8") as stream:
        for number, messages in enumerate(_records(source)):
            if enough(number, size):
                return
            line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            size += len(line.encode())
            stream.write(line)


def _stream(arguments: argparse.Namespace, folder: Path) -> None:
    file = folder / "large.jsonl"
    limit = arguments.stream_mb * 2**20
    _write(arguments.data, file, lambda _, size: size >= limit)
    before = _peak()
    begin = time.perf_counter()
    data, _ = read_source(DataSource(path=str(file)), "sft")
    seconds = time.perf_counter() - begin
    row = {
        "what": f"read {arguments.stream_mb} MiB of jsonl",
        "records": len(data),
        "seconds": round(seconds, 1),
        "mib_per_second": round(arguments.stream_mb / seconds, 1),
        "peak_mib_before": before,
        "peak_mib": _peak(),
    }
    print(json.dumps(row), flush=True)


def _tokenize(arguments: argparse.Namespace, folder: Path) -> None:
    file = folder / "data.jsonl"
    _write(arguments.data, file, lambda number, _: number >= arguments.records)
    begin = time.perf_counter()
    data, _ = read_source(DataSource(path=str(file)), "sft")
    _print("read", time.perf_counter() - begin, 0, None)
    tokenizer = load_tokenizer(arguments.tokenizer)
    chat = ChatSection(template="llama2")
    workers = num_workers(len(data))

    begin = time.perf_counter()
    ours, _ = tokenize_conversations(data, tokenizer, chat, arguments.max_length)
    _print("ours: chat layout, loss mask, exact ids", time.perf_counter() - begin,
           sum(map(len, ours["input_ids"][:])), workers)  # fmt: skip
    begin = time.perf_counter()
    tokenize_conversations(data, tokenizer, chat, arguments.max_length)
    _print("ours again, from the cache", time.perf_counter() - begin, 0, workers)

    for batched in (False, True):
        begin = time.perf_counter()
        plain = data.map(
            _plain,
            batched=batched,
            remove_columns=data.column_names,
            fn_kwargs={"tokenizer": tokenizer, "max_length": arguments.max_length},
            num_proc=workers,
        )
        what = f"datasets.map, fast tokenizer on joined text, {'batched' if batched else 'by row'}"
        _print(what, time.perf_counter() - begin, sum(map(len, plain["input_ids"][:])), workers)


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


def _print(what: str, seconds: float, tokens: int, workers: int | None) -> None:
    row = {
        "what": what,
        "processes": workers or 1,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds) if tokens else None,
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
