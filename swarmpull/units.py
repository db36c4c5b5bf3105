"""Sizes, rates and durations as people write them: ``4MiB``, ``1.5GB``, ``100MB/s``, ``30s``, ``250ms``."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Final

SIZE_FORMS: Final = "a size such as 512KiB, 4MiB, 10GB or a whole number of bytes"
RATE_FORMS: Final = (
    "a rate such as 500kB/s, 100MB/s or whole bytes per second, above 0, or unlimited"
)
DURATION_FORMS: Final = "a duration with its unit, such as 500ms, 30s, 5m, 2h or 1d"

CAPACITY_FORMS: Final = "a size such as 100GiB, a percentage such as 85%, or unlimited"

# IEC 80000-13: binary prefixes have an i; those without it are decimal, as disk vendors use them.
_SIZE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_RATE_UNITS: Final = {
    10**3: "kB",
    10**6: "MB",
    10**9: "GB",
    1 << 10: "KiB",
    1 << 20: "MiB",
    1 << 30: "GiB",
}
_DURATION_UNITS: Final = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
# Fifteen digits are what a float holds exactly.
_QUANTITY: Final = re.compile(
    r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE
)


def parse_size(text: str) -> int:
    """Bytes in ``text``.

    Raises:
        ValueError: for anything that is not a size, or not a whole number of bytes.
    """
    match = _QUANTITY.fullmatch(text.strip())
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"must be {SIZE_FORMS}: {text!r}")
    size = Decimal(match[1]) * unit
    if size != size.to_integral_value():
        raise ValueError(f"must be a whole number of bytes: {text!r}")
    return int(size)


def parse_rate(text: str) -> float:
    """Bytes per second in ``text``: a size, with or without ``/s`` behind it; inf for ``unlimited``.

    Raises:
        ValueError: for anything else, and for 0.
    """
    if text.strip() == "unlimited":
        return math.inf
    try:
        rate = parse_size(text.strip().removesuffix("/s"))
    except ValueError:
        rate = 0
    if rate == 0:
        raise ValueError(f"must be {RATE_FORMS}: {text!r}")
    return float(rate)


def parse_duration(text: str) -> float:
    """Seconds in ``text``; the unit is required, only ``0`` may stand without one.

    Raises:
        ValueError: for anything else.
    """
    match = _QUANTITY.fullmatch(text.strip())
    unit = _DURATION_UNITS.get(match[2].lower()) if match else None
    if match is not None and not match[2] and not Decimal(match[1]):
        return 0.0
    if match is None or unit is None:
        raise ValueError(f"must be {DURATION_FORMS}: {text!r}")
    return float(Decimal(match[1]) * unit)


def parse_capacity(text: str) -> str:
    """A share of some whole, in its one form: ``unlimited``, ``85%``, or a number of bytes.

    Raises:
        ValueError: for anything else, for nothing at all, and for more than the whole.
    """
    stripped = text.strip()
    if stripped.lower() == "unlimited":
        return "unlimited"
    number, percent, rest = stripped.partition("%")
    if percent:
        match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*", number, re.ASCII)
        if rest or match is None or not 0 < Decimal(match[1]) <= 100:
            raise ValueError(f"must be above 0% and at most 100%: {text!r}")
        return f"{match[1]}%"
    try:
        size = parse_size(stripped)
    except ValueError:
        raise ValueError(f"must be {CAPACITY_FORMS}: {text!r}") from None
    if not size:
        raise ValueError(f"must be above 0: {text!r}")
    return str(size)


def resolve_capacity(text: str, whole: float) -> float:
    """Bytes that `parse_capacity` means of ``whole``, which may be infinite; infinite for unlimited."""
    if text == "unlimited":
        return math.inf
    if text.endswith("%"):
        return whole * float(text[:-1]) / 100
    return float(text)


def format_size(size: int) -> str:
    """Bytes for a reader: three significant digits in the largest binary unit that fits."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    value = size / (1 << 10 * power)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def format_rate(rate: float) -> str:
    """Bytes per second as `parse_rate` reads them, in the largest unit that keeps them whole."""
    if rate == math.inf:
        return "unlimited"
    fitting = {
        size: unit for size, unit in _RATE_UNITS.items() if rate >= size and rate % size == 0
    }
    size = max(fitting, default=1)
    return f"{rate / size:.0f}{fitting.get(size, 'B')}/s"


def format_duration(seconds: float) -> str:
    """Seconds as `parse_duration` reads them, in the largest unit that keeps them whole."""
    if not seconds:
        return "0s"
    exact = Decimal(repr(seconds))
    for unit in ("d", "h", "m", "s", "ms"):
        value = exact / _DURATION_UNITS[unit]
        if value >= 1 and value == value.to_integral_value():
            return f"{int(value)}{unit}"
    return f"{exact:f}s"
