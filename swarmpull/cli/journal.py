"""``swarmpull journal``: what the backend of the indexes does not have yet, and what it can never have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from swarmpull.cli.admin_queues import addresses_argument, change_queues_of, selection, show_queues
from swarmpull.cli.options import json_option

if TYPE_CHECKING:
    from swarmpull.registry.client import AdminAnswer


@click.group()
def journal() -> None:
    """See what indexes took while their backend was down, and settle what cannot be written there.

    Indexes are named by their admin listeners; without any, those on 127.0.0.1, ports 7500 to 7599.
    """


@journal.command()
@addresses_argument
@json_option
def status(addresses: tuple[str, ...], as_json: bool) -> int:
    """Show how much waits for the backend, and each change that was set aside, with the reason."""
    from swarmpull.registry.client import JOURNAL

    return show_queues(JOURNAL, addresses, _print_status, as_json=as_json)


def _selection(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--id", "change_id", metavar="ID", help="Only the change of that id (status --json)."
        ),
        click.option("--reference", help="Only that tag, or a manifest or blob by its digest."),
        click.option("--repository", help="Only of that repository."),
    ):
        command = option(command)
    return command


@journal.command()
@addresses_argument
@_selection
@json_option
def retry(
    addresses: tuple[str, ...],
    repository: str | None,
    reference: str | None,
    change_id: str | None,
    as_json: bool,
) -> int:
    """Try what was set aside once more, at all indexes that have it."""
    wanted = selection(repository=repository, reference=reference, id=change_id)
    return _change(addresses, {"retry": wanted}, "retried", as_json=as_json)


@journal.command()
@addresses_argument
@_selection
@json_option
def drop(
    addresses: tuple[str, ...],
    repository: str | None,
    reference: str | None,
    change_id: str | None,
    as_json: bool,
) -> int:
    """Forget what was set aside, at all indexes that have it: what was acknowledged then is lost."""
    wanted = selection(repository=repository, reference=reference, id=change_id)
    if not wanted:
        raise click.UsageError("say what to drop: --repository, --reference or --id")
    return _change(addresses, {"drop": wanted}, "dropped", as_json=as_json)


def _change(
    addresses: tuple[str, ...], change: dict[str, object], key: str, *, as_json: bool
) -> int:
    from swarmpull.registry.client import JOURNAL

    return change_queues_of(JOURNAL, addresses, change, key, as_json=as_json)


def _print_status(answers: Sequence[AdminAnswer]) -> None:
    from rich.console import Console

    from swarmpull.status import journal_table, set_aside_table

    console = Console()
    console.print(journal_table(answers))
    changes = set_aside_table(answers)
    if changes.row_count:
        console.print(changes)
