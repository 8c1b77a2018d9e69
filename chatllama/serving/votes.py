"""Votes between two answers, appended to a file that `train_rm.py` reads as it is.

Each line is a record of the format `ranked`: the better answer first, equal ranks for a tie. The
reward stage counts ties and leaves them out.
"""

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from chatllama.runtime.files import flush
from chatllama.runtime.jsonl import append_lines
from chatllama.serving.schema import Vote

MOST_BYTES = 2**28
"""Size beyond which a file of votes takes no more: it is read and sent as a whole."""


class _Counted(TypedDict):
    models: list[str]
    verdict: Literal["a", "b", "tie", "both_bad"]


_COUNTED = TypeAdapter(_Counted)


def vote_record(vote: Vote) -> dict[str, Any]:
    """A record of the format `ranked`; ValueError if one of two equal answers is better."""
    answers, models = list(vote.answers), list(vote.models)
    decided = vote.verdict in ("a", "b")
    if decided and answers[0].strip() == answers[1].strip():
        raise ValueError("both answers are the same: neither can be better")
    if vote.verdict == "b":
        answers.reverse()
        models.reverse()
    return {
        "prompt": [message.plain() for message in vote.messages],
        "answers": answers,
        "ranks": [0, 1] if decided else [0, 0],
        "models": models,
        "verdict": vote.verdict,
        "reason": vote.reason.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class VoteFile:
    """A file that grows by a line a vote; made with the first."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._counted = self._votes = 0  # bytes, and the lines in them
        self._better: Counter[str] = Counter()
        self._even: Counter[str] = Counter()

    def append(self, record: dict[str, Any]) -> int:
        """Adds a line, flushed to disk; returns the number of lines.

        OSError: it cannot be written. UnicodeEncodeError: half a surrogate pair in the text.
        ValueError: the file is full.
        """
        with self._lock:
            if self._size() > MOST_BYTES:
                raise ValueError(f"the file of votes is full ({MOST_BYTES} bytes): rename it")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self._path, [record])
            flush(self._path)
            return self._count()

    def content(self) -> bytes:
        """Every line so far."""
        return self._path.read_bytes() if self._path.is_file() else b""

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.is_file() else 0

    def tally(self) -> dict[str, Any]:
        """`votes`, all lines; `better`, votes won by model; `tie` and `both_bad`.

        A line that is no vote of ours counts in `votes` alone.
        """
        with self._lock:
            votes = self._count() if self._path.is_file() else 0
            even = {verdict: self._even[verdict] for verdict in ("tie", "both_bad")}
            return {"votes": votes, "better": dict(self._better), **even}

    def _count(self) -> int:
        """The number of lines; reads only what was added since the last time."""
        if self._size() < self._counted:  # another file now
            self._counted = self._votes = 0
            self._better.clear()
            self._even.clear()
        with self._path.open("rb") as file:
            file.seek(self._counted)
            for line in file:
                if line.endswith(b"\n"):
                    self._counted += len(line)
                    self._votes += 1
                    self._add(line)
        return self._votes

    def _add(self, line: bytes) -> None:
        try:
            vote = _COUNTED.validate_json(line)
        except ValueError:
            return
        if vote["verdict"] in ("tie", "both_bad"):
            self._even[vote["verdict"]] += 1
        else:
            self._better.update(vote["models"][:1])  # the better one comes first
