"""What Prometheus is told. Each application has a registry of its own, so that two in a process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and times of one application.

    Attributes:
        requests: requests by path and status.
        seconds: their times by path.
        held_bytes: bytes of the requests that are being answered.
        pending: pictures and texts that wait or are computed.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("siglip_requests", "Requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "siglip_request_seconds", "Time to answer.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.held_bytes = Gauge("siglip_held_bytes", "Bytes of requests that are being answered.", registry=registry)
        self.pending = Gauge("siglip_pending", "Items that wait or are computed.", ["lane"], registry=registry)
        self._items = Counter("siglip_items", "Items that a tower has embedded.", ["lane"], registry=registry)
        self._batches = Histogram(
            "siglip_batch_size", "Items in one forward.", ["lane"], buckets=_SIZES, registry=registry
        )
        self._towers = Counter("siglip_tower_seconds", "Time in forwards.", ["lane"], registry=registry)

    def on_batch(self, lane: str, size: int, seconds: float) -> None:
        """Counts a batch of a tower."""
        self._items.labels(lane).inc(size)
        self._batches.labels(lane).observe(size)
        self._towers.labels(lane).inc(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
