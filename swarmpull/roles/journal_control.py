"""The journal of an index as its admin listener shows it, and what the operator asks of it."""

from __future__ import annotations

from collections.abc import Mapping

from swarmpull.errors import StoreFull, StoreUnavailable
from swarmpull.roles.index_journal import Journal


class JournalControl:
    """What ``/journal`` shows and changes; a `swarmpull.registry.admin.QueueControl`."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def document(self) -> Mapping[str, object]:
        """Everything that ``swarmpull journal status`` shows."""
        # What `/status` has of a few in a line each is in the entries of all.
        status = {k: v for k, v in self._journal.status().items() if k != "set_aside_changes"}
        return {**status, "entries": self._journal.set_aside.entries()}

    async def change(self, document: object) -> Mapping[str, object]:
        """Do what ``swarmpull journal retry`` and ``drop`` ask for.

        ``{"retry": {...}}`` with any of id, repository and reference tries what was set aside and fits once
        more; ``{"drop": {...}}``, with at least one of them, forgets it.

        Raises:
            ValueError: it is anything else, or the disk of the journal fails.
        """
        if not isinstance(document, dict) or len(document) != 1:
            raise ValueError('must be a JSON object, {"retry": {...}} or {"drop": {...}}')
        ((action, wanted),) = document.items()
        found = self._journal.set_aside.wanted(wanted)
        try:
            if action == "retry":
                return {"retried": await self._journal.retry(found)}
            if action == "drop" and wanted:
                return {"dropped": await self._journal.forget_set_aside(found)}
        except (StoreFull, StoreUnavailable) as error:
            raise ValueError(str(error)) from error
        raise ValueError("retry, or drop with at least one of id, repository and reference")
