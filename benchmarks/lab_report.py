"""What the lab measured, as Markdown and as one JSON document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs

from benchmarks.lab_network import payload_rate
from benchmarks.lab_pair import Transfer
from benchmarks.lab_swarm import Burst, GroupUsage, Prediction, SwarmOptions

MIB: Final = 1 << 20
GB: Final = 1e9

T = TypeVar("T")


@attrs.frozen
class SwarmReport:
    """The bursts by contender, and what they are measured against."""

    options: SwarmOptions
    prediction: Prediction
    bursts: dict[str, list[Burst]]


@attrs.frozen
class PairReport:
    """The transfers by contender."""

    size: int
    transfers: dict[str, list[Transfer]]


def swarm_lines(report: SwarmReport) -> Iterator[str]:
    """Three tables: times, what the processes took, where the bytes came from."""
    options, prediction = report.options, report.prediction
    rate = payload_rate(options.rate) / 1e6
    rounds = len(next(iter(report.bursts.values())))
    reading = "the whole blob" if options.read_all else "the last byte"
    yield (
        f"agents: {options.agents}, origins: {options.origins}; links of {options.rate / 1e6:g} and "
        f"{options.origin_rate / 1e6:g} Mbit/s ({rate:.1f} MB/s of payload for an agent), "
        f"{options.size / MIB:g} MiB, readers want {reading}; rounds: {rounds}; {_loads(report)}"
    )
    yield ""
    yield from _table(
        ("", "seconds", "of the bound", "of the prediction", "least", "most"),
        _time_rows(prediction, report.bursts),
    )
    yield ""
    delivered = options.agents * options.size / GB
    usages = {name: [b.usages for b in bursts] for name, bursts in report.bursts.items()}
    yield from _usage_table(usages, delivered)
    yield ""
    yield from _table(
        ("", "MiB from origins", "copies", "MiB from agents", "excess"),
        (_source_row(name, bursts, options) for name, bursts in report.bursts.items()),
    )


def pair_lines(report: PairReport) -> Iterator[str]:
    """Two tables: throughput, and what both sides took."""
    reference = _median(report.transfers["nginx"], lambda t: t.seconds)
    rounds = len(report.transfers["nginx"])
    yield f"one to one over loopback, {report.size / MIB:g} MiB; rounds: {rounds}"
    yield ""
    rows = []
    for name, transfers in report.transfers.items():
        seconds = _median(transfers, lambda t: t.seconds)
        cpu = _median(transfers, lambda t: t.cpu) / (report.size / GB)
        loads = f"{min(t.load for t in transfers):.1f} to {max(t.load for t in transfers):.1f}"
        rate, ratio = report.size / 1e6 / seconds, seconds / reference
        rows.append((name, f"{seconds:.2f}", f"{rate:.0f}", f"{ratio:.2f}", f"{cpu:.2f}", loads))
    head = ("", "seconds", "MB/s", "times nginx", "CPU s per GB, both sides", "load average")
    yield from _table(head, rows)
    yield ""
    usages = {name: [t.usages for t in found] for name, found in report.transfers.items()}
    yield from _usage_table(usages, report.size / GB)


def document(swarm: SwarmReport | None, pair: PairReport | None) -> dict[str, Any]:
    """Everything that was measured, in plain values; seconds and bytes."""
    return {
        "swarm": attrs.asdict(swarm) if swarm else None,
        "pair": attrs.asdict(pair) if pair else None,
    }


def _loads(report: SwarmReport) -> str:
    loads = [burst.load for bursts in report.bursts.values() for burst in bursts]
    return f"load average before a round: {min(loads):.1f} to {max(loads):.1f}"


def _time_rows(
    prediction: Prediction, bursts: Mapping[str, Sequence[Burst]]
) -> Iterator[Sequence[str]]:
    yield ("bound", f"{prediction.bound:.2f}", "1.00", "", "", "")
    measures = {"median": prediction.median, "slowest": prediction.slowest}
    for measure, predicted in measures.items():
        ratio = _ratio(predicted, prediction.bound)
        told = "does not finish" if predicted is None else f"{predicted:.2f}"
        yield (f"simulator: {measure}", told, ratio, _ratio(predicted, predicted), "", "")
    for name, rounds in bursts.items():
        for measure, predicted in measures.items():
            found = [float(getattr(burst, measure)) for burst in rounds]
            middle = statistics.median(found)
            yield (
                *(f"{name}: {measure}", f"{middle:.2f}", _ratio(middle, prediction.bound)),
                _ratio(middle, predicted),
                *(f"{min(found):.2f}", f"{max(found):.2f}"),
            )


def _ratio(of: float | None, to: float | None) -> str:
    return "" if of is None or to is None else f"{of / to:.2f}"


def _usage_table(
    usages: Mapping[str, Sequence[Mapping[str, GroupUsage]]], delivered: float
) -> Iterator[str]:
    """``delivered``: gigabytes that arrived in each round."""
    rows = []
    for name, rounds in usages.items():
        for kind in rounds[0]:
            found = [usage[kind] for usage in rounds]
            cpu = statistics.median(usage.cpu for usage in found)
            peaks = [usage.memory / MIB for usage in found if usage.memory is not None]
            memory = f"{max(peaks):.0f}" if peaks else ""
            cells = (f"{cpu:.2f}", f"{cpu / delivered:.2f}", memory)
            rows.append((name, kind, str(found[0].processes), *cells))
    head = ("", "process", "count", "CPU s", "per GB delivered", "peak RSS of one, MiB")
    yield from _table(head, rows, text_columns=2)


def _source_row(name: str, bursts: Sequence[Burst], options: SwarmOptions) -> Sequence[str]:
    origins = _median(bursts, lambda burst: burst.received["origin"])
    agents = _median(bursts, lambda burst: burst.received["agent"])
    excess = (origins + agents) / (options.agents * options.size) - 1
    return (
        *(name, f"{origins / MIB:.0f}", f"{origins / options.size:.2f}"),
        *(f"{agents / MIB:.0f}", f"{excess:.1%}"),
    )


def _median(measured: Sequence[T], of: Callable[[T], float]) -> float:
    return statistics.median(of(each) for each in measured)


def _table(
    head: Sequence[str],
    rows: Iterator[Sequence[str]] | Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    numbers = len(head) - text_columns
    yield f"|{'---|' * text_columns}{'---:|' * numbers}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
