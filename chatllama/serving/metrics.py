"""Counters and latencies of the server, in Prometheus' text format."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper ends of the histograms' buckets."""
COUNTERS = {
    "generated_tokens": "Tokens sampled.",
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "timeouts": "Requests that ran too long.",
    "disconnects": "Requests whose client went away before the end.",
    "engine_errors": "Failures inside the model.",
    "votes": "Votes written.",
}
HISTOGRAMS = {
    "request_seconds": "From a request's arrival to its last byte.",
    "first_token_seconds": "From a request's arrival to its first token.",
}


@dataclass
class _Histogram:
    """Observations by bucket."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


class Metrics:
    """Numbers that any thread may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._histograms = {name: _Histogram() for name in HISTOGRAMS}

    def count(self, name: str, by: int = 1) -> None:
        """Raises one of `COUNTERS`."""
        assert name in COUNTERS
        with self._lock:
            self._counts[name] += by

    def request(self, path: str, status: int) -> None:
        """Counts an answered request.

        Args:
            path: of the route; anything else as `other`, or hostile paths would fill memory.
            status: HTTP status.
        """
        with self._lock:
            self._requests[path, status] += 1

    def observe(self, name: str, seconds: float) -> None:
        """Adds to one of `HISTOGRAMS`."""
        with self._lock:
            histogram = self._histograms[name]
            histogram.counts[bisect_left(SECONDS, seconds)] += 1
            histogram.total += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything as Prometheus reads it.

        Args:
            gauges: name -> help and present value.
        """
        with self._lock:
            lines = self._head("requests_total", "Answered requests.", "counter")
            for (path, status), number in sorted(self._requests.items()):
                lines.append(
                    f'chatllama_requests_total{{path="{path}",status="{status}"}} {number}'
                )
            for name, about in COUNTERS.items():
                lines += self._head(f"{name}_total", about, "counter")
                lines.append(f"chatllama_{name}_total {self._counts[name]}")
            for name, (about, value) in gauges.items():
                lines += self._head(name, about, "gauge")
                lines.append(f"chatllama_{name} {value:g}")
            for name, about in HISTOGRAMS.items():
                lines += self._head(name, about, "histogram")
                lines += self._buckets(name)
        return "\n".join(lines) + "\n"

    def _buckets(self, name: str) -> list[str]:
        histogram, lines, seen = self._histograms[name], [], 0
        for limit, number in zip((*map(str, SECONDS), "+Inf"), histogram.counts, strict=True):
            seen += number
            lines.append(f'chatllama_{name}_bucket{{le="{limit}"}} {seen}')
        lines.append(f"chatllama_{name}_sum {histogram.total:.6f}")
        return [*lines, f"chatllama_{name}_count {seen}"]

    @staticmethod
    def _head(name: str, about: str, kind: str) -> list[str]:
        return [f"# HELP chatllama_{name} {about}", f"# TYPE chatllama_{name} {kind}"]
