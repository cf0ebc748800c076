"""Counts and times the requests of `rmcore serve` for Prometheus.

Input: requests, a `Batcher`. Output: text in Prometheus' format.
Example: rmcore_requests_total{path="/get_reward",status="200"} 64.0
"""

import time
from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rmcore.serving.batcher import Batcher

PATHS = ("/get_reward", "/classify", "/score", "/rewards", "/health", "/metrics")
# Bounds of the histogram of request times, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Requests by path and status, their seconds, and the work of the model's thread."""

    def __init__(self, batcher: Batcher) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rmcore_requests", "Requests answered or refused", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "rmcore_request_seconds", "From the whole body to the answer", buckets=BOUNDS, registry=self._registry
        )
        self._registry.register(FromBatcher(batcher))

    async def measure(self, request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Middleware that counts and times one request."""
        began = time.monotonic()
        status = 500
        try:
            response = await answer(request)
            status = response.status_code
            return response
        finally:
            self.count(request.url.path, status)
            self._seconds.observe(time.monotonic() - began)

    def count(self, path: str, status: int) -> None:
        """Count a request that was answered or refused."""
        known = path if path in PATHS else "other"  # unknown paths of scanners must not become labels
        self._requests.labels(known, str(status)).inc()

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()


class FromBatcher(Collector):
    """The counts of a batcher, read at each request for /metrics."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterable[Metric]:
        counts = self._batcher.counts
        yield CounterMetricFamily("rmcore_batches", "Batches computed", value=counts.batches)
        yield CounterMetricFamily("rmcore_jobs", "Requests that the model has computed", value=counts.jobs)
        yield CounterMetricFamily("rmcore_texts", "Texts scored", value=counts.texts)
        yield CounterMetricFamily("rmcore_tokens", "Tokens of these texts", value=counts.tokens)
        yield CounterMetricFamily("rmcore_model_seconds", "Seconds of computing", value=counts.seconds)
        yield GaugeMetricFamily("rmcore_waiting_jobs", "Requests that wait for the model", value=self._batcher.waiting)
        yield GaugeMetricFamily("rmcore_waiting_tokens", "Their tokens", value=self._batcher.waiting_tokens)
