"""What Prometheus reads: counts and times of the HTTP layer, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class HttpMetrics:
    """The metrics of one server; engines add collectors of their own to the same `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "neounify_http_requests",
            "HTTP requests by route and status; 499 when the client went away.",
            ("method", "route", "status"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "neounify_http_in_flight", "HTTP requests being read or answered.", registry=registry
        )
        self.first_token = Histogram(
            "neounify_time_to_first_token_seconds",
            "From a request's hand-over to the engines to its first text, preview or image.",
            ("task",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.total = Histogram(
            "neounify_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
