"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from mgn_deploy.serve.batching import BatchReport

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one service; each has its registry, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter("mgn_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "mgn_request_seconds", "From the headers to the answer.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.images = Counter("mgn_images", "Crops embedded.", registry=self.registry)
        self.unreadable = Counter("mgn_unreadable_images", "Crops that could not be read.", registry=self.registry)
        self.batch = Histogram("mgn_batch_images", "Crops an engine call.", buckets=_SIZES, registry=self.registry)
        self.engine = Histogram("mgn_engine_seconds", "An engine call.", buckets=_SECONDS, registry=self.registry)
        self.waited = Histogram(
            "mgn_queue_seconds",
            "From a crop's handing in to its engine call.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queued = Gauge("mgn_queued_images", "Crops taken and not answered.", registry=self.registry)
        self.gallery = Gauge("mgn_gallery_images", "Embedded images in the store.", registry=self.registry)

    def add_batch(self, report: BatchReport) -> None:
        """Count an engine call."""
        self.images.inc(report.images)
        self.batch.observe(report.images)
        self.engine.observe(report.seconds)
        for seconds in report.waited:
            self.waited.observe(seconds)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
