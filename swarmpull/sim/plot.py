"""Pictures of simulated swarms, as SVG written by hand: no plotting library is needed for two diagrams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape

import attrs

from swarmpull.sim.options import SimulationOptions
from swarmpull.sim.result import SimulationResult
from swarmpull.sim.sampling import Sample, quantile

WIDTH: Final = 1000
ROW_HEIGHT: Final = 392
HEADER_HEIGHT: Final = 64
# More points than pixels show nothing more.
POINTS_MAX: Final = 300
TICKS: Final = 6

INK: Final = "#1f2937"
SOFT: Final = "#6b7280"
GRID: Final = "#e5e7eb"
MAIN: Final = "#2563eb"
WARM: Final = "#d97706"
GREEN: Final = "#059669"

Point = tuple[float, float]


def draw(options: SimulationOptions, results: Sequence[SimulationResult]) -> str:
    """One row for each result: completion times on the left, the spread of pieces on the right."""
    height = HEADER_HEIGHT + ROW_HEIGHT * len(results)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(24, 30, _title(options), size=17, weight=600),
        _text(24, 50, _subtitle(options), fill=SOFT),
    ]
    for number, result in enumerate(results):
        top = HEADER_HEIGHT + ROW_HEIGHT * number
        parts += _completions(result, top)
        parts += _spread(result, top)
    return "\n".join([*parts, "</svg>", ""])


def _title(options: SimulationOptions) -> str:
    what = f"{options.size / 1e9:.3g} GB"
    if options.images:
        return f"{options.images:,} images of {what}, each for {options.pullers} of {options.hosts:,} hosts"
    return f"{what} to {options.hosts:,} hosts"


def _subtitle(options: SimulationOptions) -> str:
    parts = [
        f"{options.layers} layers" if options.layers > 1 else "1 layer",
        f"hosts at {options.rate / 1e6:g} MB/s",
        f"{options.origins} origins at {options.origin_rate / 1e6:g} MB/s",
        f"round trip {options.rtt * 1e3:g} ms",
        f"arrivals within {options.arrival:g} s",
        *(["every host reads in order"] if options.readers else []),
        *map(str, options.faults),
    ]
    return ", ".join(parts)


@attrs.frozen
class _Panel:
    """A diagram with its axes; x in seconds from 0, y a share."""

    left: float
    top: float
    x_max: float
    width: float = 415.0
    height: float = 262.0

    def at(self, point: Point) -> str:
        x = self.left + self.width * point[0] / self.x_max
        y = self.top + self.height * (1 - point[1])
        return f"{x:.1f},{y:.1f}"

    def frame(self, title: str, x_label: str) -> Iterator[str]:
        yield _text(self.left, self.top - 14, title, weight=600)
        for percent in range(0, 101, 25):
            x, y = self.at((0, percent / 100)).split(",")
            yield _line(f"M{x} {y}h{self.width}", GRID)
            yield _text(self.left - 8, float(y) + 4, f"{percent} %", fill=SOFT, anchor="end")
        step = _nice_step(self.x_max / TICKS)
        for number in range(int(self.x_max / step) + 1):
            x, y = self.at((number * step, 0)).split(",")
            yield _line(f"M{x} {y}v5", SOFT)
            yield _text(float(x), float(y) + 19, f"{number * step:g}", fill=SOFT, anchor="middle")
        middle = self.left + self.width / 2
        yield _text(middle, self.top + self.height + 36, x_label, fill=SOFT, anchor="middle")

    def curve(self, points: Sequence[Point], color: str, *, width: float = 2.0) -> str:
        return _line("M" + "L".join(map(self.at, points)), color, width=width)

    def mark(self, x: float, label: str, height: float, color: str) -> Iterator[str]:
        """A dashed vertical line with a label to its left."""
        if x <= self.x_max:
            yield _line(f"M{self.at((x, 0))}L{self.at((x, 1))}", color, dash="4 3")
            place_x, place_y = self.at((x, height)).split(",")
            yield _text(float(place_x) - 6, float(place_y), label, fill=color, anchor="end")


def _completions(result: SimulationResult, top: float) -> Iterator[str]:
    longest = max(quantile(result.times, 1.0), result.bound) if result.times else result.bound
    panel = _Panel(64, top + 32, longest * 1.06)
    yield from panel.frame(
        f"Hosts that have everything ({result.policy.value})",
        "seconds since the host's own arrival",
    )
    yield from panel.mark(result.bound, f"bound {result.bound:.2f} s", 0.92, SOFT)
    if not result.times:
        return
    count = len(result.times)
    steps = _thin([(time, (n + 1) / count) for n, time in enumerate(result.times)])
    end = (panel.x_max, 1.0) if result.completed == result.expected else steps[-1]
    yield panel.curve([(0, 0), (steps[0][0], 0), *steps, end], MAIN)
    for line, (name, share) in enumerate((("p50", 0.5), ("p99", 0.99), ("max", 1.0))):
        text = f"{name}  {result.quantile(share):.2f} s  = {result.ratio(share):.3f} x bound"
        yield _text(panel.left + 14, panel.top + 110 + 20 * line, text, size=13)


def _spread(result: SimulationResult, top: float) -> Iterator[str]:
    samples = result.samples
    if not samples:
        return
    panel = _Panel(560, top + 32, samples[-1].time or 1.0)
    yield from panel.frame("Pieces and uplinks over time", "seconds since the first arrival")
    low, high = (_series(samples, pick) for pick in (_low, _high))
    band = "M" + "L".join(map(panel.at, [*low, *reversed(high)])) + "Z"
    yield f'<path d="{band}" fill="{MAIN}" fill-opacity="0.22"/>'
    yield panel.curve(_series(samples, _middle), MAIN)
    yield panel.curve(_series(samples, _copied), WARM)
    yield panel.curve(_series(samples, _sending), GREEN, width=1.2)
    legend = (
        (MAIN, "pieces at a host: median, 1st to 99th"),
        (WARM, "pieces that have left the origins"),
        (GREEN, "uplinks of hosts that send"),
    )
    for line, (color, text) in enumerate(legend):
        x, y = panel.left + 210 * (line % 2), panel.top + panel.height + 58 + 18 * (line // 2)
        yield _line(f"M{x} {y - 4}h18", color, width=3)
        yield _text(x + 26, y, text)


def _low(sample: Sample) -> float:
    return sample.low


def _middle(sample: Sample) -> float:
    return sample.middle


def _high(sample: Sample) -> float:
    return sample.high


def _copied(sample: Sample) -> float:
    return sample.copied


def _sending(sample: Sample) -> float:
    return sample.sending


def _series(samples: Sequence[Sample], pick: Callable[[Sample], float]) -> list[Point]:
    # Before the first agent has arrived there are no shares.
    points = [(sample.time, pick(sample)) for sample in samples]
    return _thin([point for point in points if math.isfinite(point[1])])


def _thin(points: list[Point]) -> list[Point]:
    """At most `POINTS_MAX` of the points, with the first and the last."""
    if len(points) <= POINTS_MAX:
        return points
    last = len(points) - 1
    return [points[round(n * last / (POINTS_MAX - 1))] for n in range(POINTS_MAX)]


def _nice_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    fill: str = INK,
    size: int = 12,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(path: str, color: str, *, width: float = 1.0, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashes}/>'
