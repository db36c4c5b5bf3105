"""Logs go to standard error in one format; metrics of two roles in one process do not meet."""

from __future__ import annotations

import json
import logging

import pytest
import structlog
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from swarmpull.config import LogConfig
from swarmpull.telemetry import Metrics, setup_logging, watch_event_loop


@pytest.fixture(autouse=True)
def restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def samples(metrics: Metrics) -> dict[str, float]:
    """Name (with labels, if any) -> value."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_json_logs_are_one_object_per_line_with_the_bound_context(capsys) -> None:
    setup_logging(LogConfig(format="json"))
    with structlog.contextvars.bound_contextvars(role="agent"):
        structlog.get_logger().info("piece stored", digest="sha256:ab", index=3)
    line = json.loads(capsys.readouterr().err)
    line.pop("timestamp")
    assert line == {
        "event": "piece stored",
        "level": "info",
        "role": "agent",
        "digest": "sha256:ab",
        "index": 3,
    }


def test_a_failure_in_a_json_log_is_still_one_line(capsys) -> None:
    setup_logging(LogConfig(format="json"))
    try:
        raise LookupError("a defect")
    except LookupError:
        structlog.get_logger().exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["exception"][0]["exc_value"] == "a defect"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_below_the_level_nothing_is_logged(capsys, log_format) -> None:
    setup_logging(LogConfig(level="warning", format=log_format))
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    captured = capsys.readouterr()
    assert "quiet" not in captured.err
    assert "loud" in captured.err
    assert captured.out == ""


def test_what_libraries_log_comes_in_the_same_format_from_warning_on(capsys) -> None:
    setup_logging(LogConfig(format="json"))
    logging.getLogger("hypercorn.error").info("Running on ...")
    logging.getLogger("hypercorn.error").warning("%s connections", 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        json.loads(line).items()
        >= {
            "event": "5 connections",
            "level": "warning",
            "logger": "hypercorn.error",
        }.items()
    )


def test_two_roles_in_one_process_have_metrics_of_the_same_name() -> None:
    agents = [Metrics(), Metrics()]
    counters = [m.counter("bytes_sent_total", "Bytes sent.", ["to"]) for m in agents]
    counters[0].labels(to="agent").inc(5)
    counters[1].labels(to="agent").inc(7)
    gauge = agents[0].gauge("torrents", "Torrents.")
    gauge.set(2)
    agents[1].histogram("wait_seconds", "Waiting.", (0.1, 1.0)).observe(0.5)
    first, second = map(samples, agents)
    assert first["swarmpull_bytes_sent_total{to=agent}"] == 5
    assert second["swarmpull_bytes_sent_total{to=agent}"] == 7
    assert first["swarmpull_torrents"] == 2
    assert "swarmpull_torrents" not in second
    assert second["swarmpull_wait_seconds_bucket{le=1.0}"] == 1
    assert first["process_resident_memory_bytes"] > 0


async def test_a_blocked_event_loop_shows_in_the_metrics(autojump_clock) -> None:
    metrics = Metrics()
    with trio.move_on_after(5):
        await watch_event_loop()
    before = samples(metrics)["swarmpull_event_loop_delay_seconds_count"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_event_loop)
        await trio.sleep(0.05)
        # the sampler is due 0.1 s after it began and runs 0.65 s late
        autojump_clock.jump(0.7)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    after = samples(metrics)
    assert after["swarmpull_event_loop_delay_seconds_count"] > before
    assert after["swarmpull_event_loop_delay_max_seconds"] == pytest.approx(0.65)


async def test_the_tasks_of_the_event_loop_are_counted(autojump_clock) -> None:
    async def counted() -> float:
        await trio.sleep(1)
        return samples(Metrics())["swarmpull_tasks"]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_event_loop)
        before = await counted()
        async with trio.open_nursery() as many:
            for _ in range(50):
                many.start_soon(trio.sleep_forever)
            assert await counted() == before + 50
            many.cancel_scope.cancel()
        assert await counted() == before
        nursery.cancel_scope.cancel()
