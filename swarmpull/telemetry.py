"""Logs and metrics: structlog on standard error, Prometheus metrics with one registry per role."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any, Final

import structlog
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector

from swarmpull.config import LogConfig

METRIC_PREFIX: Final = "swarmpull_"

# From a millisecond, the resolution of the measurement, to the seconds that an operator would notice.
_DELAY_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
_DELAY_INTERVAL: Final = 0.1


def setup_logging(config: LogConfig) -> None:
    """Send structlog, and what libraries log through `logging`, to standard error in one format."""
    level = logging.getLevelNamesMapping()[config.level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final = _renderer(config)
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    _route_standard_logging(level, shared, final)


def _renderer(config: LogConfig) -> list[Any]:
    if config.format == "json":
        return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # the rich one prints the values of local variables: pages of them, payloads included
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]


def _route_standard_logging(level: int, shared: list[Any], final: list[Any]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries say at "info" what we say ourselves.
    root.setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))


class Metrics:
    """The metrics of one role.

    Several roles and agents share a process, so none of them may use the global registry.  Names are
    given without the common prefix ``swarmpull_``; counters end in ``_total``.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(METRIC_PREFIX + name, meaning, labels, registry=self.registry)

    def gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(METRIC_PREFIX + name, meaning, labels, registry=self.registry)

    def histogram(
        self, name: str, meaning: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        """``buckets``: upper bounds, ascending, without infinity."""
        return Histogram(
            METRIC_PREFIX + name, meaning, labels, buckets=buckets, registry=self.registry
        )

    def render(self) -> tuple[bytes, str]:
        """The body for ``/metrics`` and its content type; the metrics of the process come first."""
        body = generate_latest(_process_metrics().registry) + generate_latest(self.registry)
        return body, CONTENT_TYPE_LATEST


@functools.cache
def _process_metrics() -> Metrics:
    metrics = Metrics()
    ProcessCollector(registry=metrics.registry)
    return metrics


@functools.cache
def _event_loop() -> tuple[Histogram, Gauge, Gauge]:
    metrics = _process_metrics()
    return (
        metrics.histogram(
            "event_loop_delay_seconds",
            "How much later than due a task runs, sampled ten times a second.",
            _DELAY_BUCKETS,
        ),
        metrics.gauge(
            "event_loop_delay_max_seconds", "The longest such delay since the process started."
        ),
        metrics.gauge("tasks", "Tasks of the event loop, a few for each connection and request."),
    )


async def watch_event_loop() -> None:
    """Measure how long tasks wait for the event loop, and count them, until cancelled."""
    histogram, worst, tasks = _event_loop()
    longest = 0.0
    due = trio.current_time()
    while True:
        due = max(due + _DELAY_INTERVAL, trio.current_time())
        await trio.sleep_until(due)
        delay = trio.current_time() - due
        histogram.observe(delay)
        tasks.set(trio.lowlevel.current_statistics().tasks_living)
        if delay > longest:
            longest = delay
            worst.set(longest)
