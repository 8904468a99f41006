"""What Prometheus reads from the server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rankbook.tools.serve.scheduler import Scheduler

MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics(Collector):
    """Counters of a scheduler in Prometheus' format."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all of them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the state of this moment."""
        now = self._scheduler.counters
        yield GaugeMetricFamily("rankbook_requests_waiting", "Requests in the queue.", now.waiting)
        yield GaugeMetricFamily("rankbook_requests_active", "Requests that are decoded.", now.active)
        yield CounterMetricFamily("rankbook_steps", "Decode steps, each for all active requests.", now.steps)
        yield CounterMetricFamily("rankbook_prompt_tokens", "Tokens of prompts that were computed.", now.prompt_tokens)
        yield CounterMetricFamily("rankbook_tokens", "Tokens that were generated.", now.tokens)
        finished = CounterMetricFamily("rankbook_requests", "Requests that ended, by how.", labels=["finish_reason"])
        for reason, count in dict(now.finished).items():  # the scheduler adds reasons meanwhile
            finished.add_metric([reason], count)
        yield finished
