"""Counters and latencies of the server, in Prometheus' text format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

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
GAUGES = {
    "running": "Answers being decoded.",
    "waiting": "Answers that wait for their turn.",
    "adapters": "Adapters loaded at run time.",
}
HISTOGRAMS = {
    "request_seconds": "From a request's arrival to its last byte.",
    "first_token_seconds": "From a request's arrival to its first token.",
}


class Metrics(Collector):
    """One server's metrics, in a registry of its own; any thread may update them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registered = {"namespace": "chatllama", "registry": self._registry}
        labels = ("path", "status")
        self._requests = Counter("requests", "Answered requests.", labels, **registered)
        self._counters = {key: Counter(key, text, **registered) for key, text in COUNTERS.items()}
        self._gauges = {key: Gauge(key, text, **registered) for key, text in GAUGES.items()}
        self._histograms = {
            key: Histogram(key, text, buckets=SECONDS, **registered)
            for key, text in HISTOGRAMS.items()
        }

    def count(self, name: str, by: int = 1) -> None:
        """Raises one of `COUNTERS`."""
        self._counters[name].inc(by)

    def request(self, path: str, status: int) -> None:
        """Counts a request; `path` is a route's or `other`, or hostile paths would fill memory."""
        self._requests.labels(path, status).inc()

    def observe(self, name: str, seconds: float) -> None:
        """Adds to one of `HISTOGRAMS`."""
        self._histograms[name].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The metrics without the `_created` series that the client adds to each."""
        for metric in self._registry.collect():
            metric.samples = [each for each in metric.samples if not each.name.endswith("_created")]
            yield metric

    def text(self, **gauges: float) -> str:
        """Everything as Prometheus reads it, with the present values of `GAUGES`."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        return generate_latest(self).decode()
