"""How many processes share the work on a data set."""

import os

RECORDS_PER_WORKER = 5000  # fewer are done before a second process has started


def num_workers(num_records: int) -> int | None:
    """Processes for `Dataset.map`: all cores of this machine shared among its ranks, or None.

    None, the calling process alone, where the records are too few to be worth it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    wanted = min((cores or 1) // ranks, num_records // RECORDS_PER_WORKER)
    return wanted if wanted > 1 else None
