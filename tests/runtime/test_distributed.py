"""Waits for other ranks have our limit, over gloo also where tensors go over (a played) NCCL."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from launching import free_port

from chatllama.runtime import distributed
from chatllama.runtime.distributed import (
    all_gather_objects,
    all_sum,
    barrier,
    from_rank_zero,
    meet,
    open_groups,
)
from trainers.stages.arguments import LOST_RANK_WORDS

dist: Any = torch.distributed
LIMIT = 0.02
"""Minutes."""
WAITS: dict[str, Callable[[], object]] = {
    "barrier": barrier,
    "objects": lambda: all_gather_objects("x"),
    "rank 0": lambda: from_rank_zero("x"),
    "tensors": lambda: all_sum(torch.ones(2)),
}


def like_nccl() -> str:
    """The name of a backend that, as NCCL, contacts nobody when it is opened."""
    if not hasattr(dist.Backend, "SILENT"):

        def create(store: Any, rank: int, size: int, timeout: Any) -> Any:
            return cast(Any, torch._C)._distributed_c10d.FakeProcessGroup._create_internal(
                rank, size
            )

        dist.Backend.register_backend("silent", create, devices=["cpu"])
    return "silent"


def on_two_ranks(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    ranks: tuple[Callable[[], object], Callable[[], object]],
    backend: str,
    stopped: int = 1,
) -> list[str]:
    """What the functions return on each rank, as text, or an error; nothing of a stopped one."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    children: list[int] = []
    for number, work in enumerate(ranks):
        child = os.fork()
        if child == 0:
            os.environ["RANK"] = str(number)
            if backend == "silent":
                like_nccl()
            distributed.work_backend = lambda: backend
            try:
                found = str(work())
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            (folder / str(number)).write_text(found)
            os._exit(0)
        children.append(child)
    os.waitpid(children[1 - stopped], 0)
    os.kill(children[stopped], signal.SIGKILL)
    os.waitpid(children[stopped], 0)
    return [(folder / n).read_text() if (folder / n).is_file() else "" for n in ("0", "1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "wait"),
    [*(("gloo", w) for w in WAITS), *(("silent", w) for w in ("barrier", "objects", "rank 0"))],
)
def test_a_stopped_rank_is_waited_for_no_longer_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, wait: str
):
    def waits() -> float:
        open_groups(LIMIT)
        barrier()
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="Timed out waiting"):
            WAITS[wait]()
        return time.monotonic() - started

    def stops() -> None:
        open_groups(LIMIT)
        barrier()
        os.kill(os.getpid(), signal.SIGSTOP)

    stopped = 0 if wait == "rank 0" else 1
    works = (stops, waits) if stopped == 0 else (waits, stops)
    found = on_two_ranks(monkeypatch, tmp_path, works, backend, stopped)[1 - stopped]
    assert LIMIT * 60 * 0.9 < float(found) < LIMIT * 60 + 10


@pytest.mark.parametrize("backend", ["gloo", "silent"])
def test_a_rank_that_fails_before_it_has_met_the_others_is_missed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
):
    def starts() -> None:
        open_groups(minutes=5)
        barrier()

    started = time.monotonic()
    found, met = on_two_ranks(monkeypatch, tmp_path, (starts, meet), backend)
    assert met == "None" and any(words in found for words in LOST_RANK_WORDS), found
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("local_rank", "gpus", "expected"),
    [("0", 8, 0), ("5", 8, 5), ("5", 1, 0), ("3", 1, 0), (None, 4, 0), ("1", 0, None)],
)
def test_each_process_has_its_own_gpu_also_where_it_sees_no_other(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, gpus: int, expected: int | None
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    place = distributed.device()
    assert place == (torch.device("cpu") if expected is None else torch.device("cuda", expected))


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_single_rank_needs_no_port(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `deepspeed` on one GPU, where another job has port 29500."""
    taken = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    port = str(taken.port)
    variables = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    open_groups(LIMIT)
    try:
        barrier()
        assert all_sum(torch.ones(2)).tolist() == [1, 1] and dist.new_group() is not None
        assert all_gather_objects("x") == ["x"] and from_rank_zero("y") == "y"
    finally:
        dist.destroy_process_group()
