"""Byte rates: what a host sends to peers and receives from them, changeable while running."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import attrs
import structlog

from swarmpull.store.token_bucket import TokenBucket
from swarmpull.units import RATE_FORMS, format_rate, parse_rate

log = structlog.get_logger()


@attrs.frozen
class Rates:
    """The rates of one host: of pieces to its peers, and from them."""

    upload: TokenBucket = attrs.field(factory=TokenBucket)
    download: TokenBucket = attrs.field(factory=TokenBucket)

    def document(self) -> dict[str, float | None]:
        """As the admin listener shows them: bytes per second, None for no limit."""
        return {key: _shown(bucket.rate) for key, bucket in self._buckets().items()}

    def change(self, document: object) -> None:
        """Set one rate or both from a document of that form; a text such as ``100MB/s`` is a rate too.

        Raises:
            ValueError: it is anything else; then nothing is changed.
        """
        buckets = self._buckets()
        if not isinstance(document, Mapping) or not document or document.keys() - buckets.keys():
            raise ValueError(f"must be a JSON object with {' or '.join(buckets)}, or both")
        rates = {str(key): _rate(str(key), value) for key, value in document.items()}
        for key, rate in rates.items():
            old = buckets[key].rate
            if rate != old:
                buckets[key].set_rate(rate)
                log.info("rate_changed", rate=key, old=format_rate(old), new=format_rate(rate))

    def _buckets(self) -> dict[str, TokenBucket]:
        return {"upload_rate": self.upload, "download_rate": self.download}


@attrs.define(eq=False)
class Toll:
    """What may be sent to one peer, and how much was.

    Attributes:
        bucket: of its rate; several peers may share one.
        sent: bytes so far.
    """

    bucket: TokenBucket
    sent: int = 0


def _shown(rate: float) -> float | None:
    if rate == math.inf:
        return None
    return int(rate) if rate == int(rate) else rate


def _rate(key: str, value: object) -> float:
    if value is None:
        return math.inf
    if isinstance(value, str):
        try:
            return parse_rate(value)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from error
    # A fraction of a byte would do, but is a mistake; JSON as Python reads it has NaN and infinity, too.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be {RATE_FORMS}, null for unlimited: {value!r:.100}")
    if not 1 <= value <= sys.float_info.max:
        raise ValueError(
            f"{key} must be at least 1 byte per second, null for unlimited: {value!r:.100}"
        )
    return float(value)
