"""What Prometheus is told. Each application has a registry of its own, so that two in a process do not mix."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and times of one application.

    Attributes:
        requests: requests by path and status.
        seconds: their times by path.
        pending: pictures and texts that wait or are computed.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("siglip_requests", "Requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "siglip_request_seconds", "Time to answer.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.pending = Gauge("siglip_pending", "Items that wait or are computed.", ["lane"], registry=registry)
        self._items = Counter("siglip_items", "Items that a tower has embedded.", ["lane"], registry=registry)
        self._batches = Histogram(
            "siglip_batch_size", "Items in one forward.", ["lane"], buckets=_SIZES, registry=registry
        )
        self._towers = Counter("siglip_tower_seconds", "Time in forwards.", ["lane"], registry=registry)

    def on_answer(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def on_batch(self, lane: str, size: int, seconds: float) -> None:
        """Counts a batch of a tower."""
        self._items.labels(lane).inc(size)
        self._batches.labels(lane).observe(size)
        self._towers.labels(lane).inc(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


def summed(texts: Iterable[bytes]) -> bytes:
    """What several processes tell Prometheus, added up."""
    kinds: dict[str, tuple[str, str]] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            kinds[family.name] = (family.documentation, family.type)
            of_family = values.setdefault(family.name, {})
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # times, which cannot be added
                    key = (sample.name, tuple(sample.labels.items()))
                    of_family[key] = of_family.get(key, 0.0) + sample.value
    lines = []
    for name, (documentation, kind) in kinds.items():
        shown = f"{name}_total" if kind == "counter" else name
        lines += [f"# HELP {shown} {documentation}", f"# TYPE {shown} {kind}"]
        for (sample_name, labels), value in values[name].items():
            inside = ",".join(f'{label}="{text}"' for label, text in labels)
            lines.append(f"{sample_name}{{{inside}}} {value}" if labels else f"{sample_name} {value}")
    return ("\n".join(lines) + "\n").encode()
