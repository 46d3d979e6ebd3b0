"""Prometheus collector of the service's and the engines' metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

GAUGES = {
    "requests": "Requests under way.",
    "image_tokens": "Tokens of the images of all requests under way.",
    "und_waiting": "Sequences that wait for room in the cache.",
    "und_reading": "Calls whose prompts are being read.",
    "und_writing": "Sequences that are being written.",
    "und_cache_used": "Share of the key-value cache that sequences use, 0 to 1.",
    "gen_images": "Images under way in the generation engine.",
    "gen_batch": "Images that took part in the last denoising step.",
}
COUNTERS = {
    "restarts": "Engines started again after they died.",
    "und_steps": "Steps of the understanding engine.",
    "und_step_seconds": "Time spent in them, seconds.",
    "und_read_tokens": "Tokens of prompts that were read.",
    "und_known_tokens": "Tokens of prompts that were known from earlier requests.",
    "und_written_tokens": "Tokens that were written.",
    "und_preempted": "Sequences that had to give up their room in the cache for others.",
    "gen_steps": "Denoising steps of the generation engine.",
    "gen_step_seconds": "Time spent in them, seconds.",
    "gen_image_steps": "Steps of single images: divided by gen_steps, the mean batch.",
}


class Reporting(Protocol):
    """Metrics of a service."""

    def gauges(self) -> Mapping[str, float]: ...

    def counters(self) -> Mapping[str, float]: ...


class EngineCollector(Collector):
    """Reads a service whenever Prometheus asks; names without a value are left out."""

    def __init__(self, service: Reporting) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        gauges, counters = self._service.gauges(), self._service.counters()
        for name, help_text in GAUGES.items():
            if name in gauges:
                yield GaugeMetricFamily(f"neounify_{name}", help_text, value=gauges[name])
        for name, help_text in COUNTERS.items():
            if name in counters:
                yield CounterMetricFamily(f"neounify_{name}", help_text, value=counters[name])
