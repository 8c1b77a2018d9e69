"""Texts that a chat template writes, from a process that may fail without this one.

One such process at a time, started at the first use and after a failure. What it may do and use is
in `template_worker.py`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from chatllama.text import template_worker

Conversation = tuple[Sequence[Any], bool]
"""Messages, and whether an answer is opened after them."""


class _Worker:
    """The process, and a lock for one question at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None


_workers: dict[int, _Worker] = {}
"""By process id: a forked process must not share its parent's."""


def rendered(
    template: str, tokens: Mapping[str, Any], conversations: Sequence[Conversation]
) -> list[str]:
    """What the template writes for each conversation.

    Args:
        tokens: name -> text of the tokenizer's special tokens, which templates use.

    Raises:
        ValueError: the template refuses a conversation, fails, or takes too much time or memory.
    """
    request = {"template": template, "tokens": dict(tokens), "conversations": list(conversations)}
    line = json.dumps(request) + "\n"
    worker = _workers.setdefault(os.getpid(), _Worker())
    with worker.lock:
        found = _ask(worker, line)
    if "error" in found:
        raise ValueError(f"the tokenizer's chat template {found['error']}")
    return found["texts"]


def _ask(worker: _Worker, line: str) -> dict[str, Any]:
    process = worker.process
    if process is None or process.poll() is not None:
        command, pipe = [sys.executable, "-I", template_worker.__file__], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")
        worker.process = process
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        if answer := process.stdout.readline():
            return json.loads(answer)
    except BrokenPipeError:
        pass
    except BaseException:  # a signal between question and answer, which belongs to no one then
        process.kill()
        raise
    if process.wait() == -signal.SIGXCPU:
        return {"error": f"takes more than {template_worker.CPU_SECONDS} s"}
    return {"error": f"ends its process (code {process.returncode})"}
