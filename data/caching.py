"""Cached results of `Dataset.map`: what names them, and how many processes make them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from datasets import Dataset, Features
from datasets import config as datasets_config

from chatllama.runtime.hub import unwritable
from chatllama.runtime.machine import count_cores

RECORDS_PER_WORKER = 5000  # fewer are done before a second process has started
PROJECT_ROOT = Path(__file__).resolve().parent.parent
# The packages that make records and tokens: a change of any line of them makes caches stale.
CODE_OF_TOKENS = ("data", "chatllama/text")


def code_digest() -> str:
    """Digest of the code that makes records and tokens: a part of the name of cached results."""
    digest = hashlib.blake2b(digest_size=8)
    for package in CODE_OF_TOKENS:
        for file in sorted((PROJECT_ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def writing_cache() -> Iterator[None]:
    """What `datasets` writes inside goes to its cache.

    Raises:
        ValueError: it cannot be written, from the start or in the middle.
    """
    folder = Path(datasets_config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        yield
    except OSError as error:
        raise unwritable("the cache of data sets", folder, error) from error


def cached_map(
    data: Dataset,
    function: Callable[..., dict[str, Any]],
    features: dict[str, Any],
    *arguments: Any,
    batched: bool = False,
) -> Dataset:
    """The columns `features` that `function` makes of every row and the arguments.

    Cached under the data, the arguments and the code. With `batched` the function takes batches as
    columns, which cost far less than rows.
    """
    with writing_cache():
        return data.map(
            _call,
            batched=batched,
            features=Features(features),
            remove_columns=data.column_names,
            fn_kwargs={"function": function, "arguments": arguments, "code": code_digest()},
            num_proc=num_workers(len(data)),
        )


def _call(
    row: dict[str, Any], function: Callable[..., dict[str, Any]], arguments: tuple, code: str
) -> dict[str, Any]:
    """`code` only names the cache entry."""
    return function(row, *arguments)


def num_workers(num_records: int) -> int | None:
    """Processes for `Dataset.map`: all cores of this machine shared among its ranks, or None.

    None, the calling process alone, where the records are too few to be worth it.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    workers = min(count_cores() // ranks, num_records // RECORDS_PER_WORKER)
    return workers if workers > 1 else None
