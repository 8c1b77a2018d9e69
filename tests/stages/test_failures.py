"""Failures: the message names the port or the limit and the remedy; the folder keeps the reason."""

import json
import os
import socket
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from chatllama.runs.lock import InUse
from chatllama.runtime import distributed
from trainers.stages.arguments import _failure, _recorded

dist: Any = torch.distributed


def listening(family: int, host: str) -> socket.socket:
    listener = socket.socket(family)
    listener.bind((host, 0))
    listener.listen()
    return listener


@pytest.mark.parametrize("taken_by", ["ipv4", "ipv6", "another job"])
def test_a_taken_port_is_named_with_the_option(
    taken_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taken_by == "another job":
        job = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        port = job.port
    else:
        ipv4 = taken_by == "ipv4"
        family = socket.AF_INET if ipv4 else socket.AF_INET6
        listener = listening(family, "0.0.0.0" if ipv4 else "::")
        port = listener.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dist.DistError) as caught:
        dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=5))
    code, message = _failure(caught.value)
    assert code == 2 and f"port {port} is taken" in message
    assert "--master_port" in message and "--master-port" in message


def silent_rank(folder: str, limit: float) -> Exception:
    """The error of a rank whose peer joined the group and then stopped for good."""
    store = dist.FileStore(f"{folder}/store", 2)
    child = os.fork()
    if child == 0:
        group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=60))
        os.kill(os.getpid(), 19)  # SIGSTOP
        os._exit(len(repr(group)) and 1)
    try:
        group = dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=limit))
        with pytest.raises(RuntimeError) as caught:
            group.allreduce([torch.zeros(1)]).wait()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return caught.value


def test_a_stopped_rank_ends_the_job_with_the_limit_that_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed._waits, "minutes", 7.0)
    code, message = _failure(silent_rank(str(tmp_path), 1.0))
    assert code == 1 and "within 7 minutes (deepspeed.timeout_minutes)" in message
    assert "--resume" in message and "Traceback" not in message


def test_why_a_stage_ended_is_kept_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, failed = tmp_path / "c.yaml", tmp_path / "run" / "sft" / "failed.json"
    text = "backbone: {path: m}\nchat: {template: llama2}\nsft: {data: [{path: a.jsonl}]}\n"
    config.write_text(f"run_dir: {tmp_path}/run\n{text}")
    monkeypatch.setattr(sys, "argv", ["/x/train_sft.py", str(config)])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with suppress(InUse):
        _recorded(InUse("another runs there"))
    assert not failed.is_file()
    assert _recorded(ValueError("lora.r is odd"))[0] == 2
    assert json.loads(failed.read_text()) == {"reason": "lora.r is odd", "code": 2}
    with pytest.raises(KeyError):  # the code's own: a traceback follows
        _recorded(KeyError("k"))
    assert json.loads(failed.read_text())["code"] == 2  # what was said first
    failed.unlink()
    with pytest.raises(KeyError):
        _recorded(KeyError("k"))
    assert json.loads(failed.read_text()) == {"reason": "KeyError: 'k'", "code": 1}
