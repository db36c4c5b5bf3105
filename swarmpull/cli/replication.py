"""``swarmpull replication``: what other clusters were not told of yet, and having it tried again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from swarmpull.cli.admin_queues import addresses_argument, change_queues_of, selection, show_queues
from swarmpull.cli.options import json_option

if TYPE_CHECKING:
    from swarmpull.registry.client import AdminAnswer


@click.group()
def replication() -> None:
    """See and hurry what indexes replicate to other clusters.

    Indexes are named by their admin listeners; without any, those on 127.0.0.1, ports 7500 to 7599.
    """


@replication.command()
@addresses_argument
@json_option
def status(addresses: tuple[str, ...], as_json: bool) -> int:
    """Show the queue for each remote cluster, how far each copy is, and why what fails does."""
    from swarmpull.registry.client import REPLICATION

    return show_queues(REPLICATION, addresses, _print_status, as_json=as_json)


@replication.command()
@addresses_argument
@click.option("--remote", help="Only what goes to that remote.")
@click.option("--repository", help="Only of that repository.")
@click.option("--tag", help="Only that tag, or what has no tag by its digest.")
@json_option
def retry(
    addresses: tuple[str, ...],
    remote: str | None,
    repository: str | None,
    tag: str | None,
    as_json: bool,
) -> int:
    """Try what waits at once, also what was set aside because it could not succeed."""
    wanted = selection(remote=remote, repository=repository, tag=tag)
    return _change(addresses, {"retry": wanted}, "retried", as_json=as_json)


@replication.command()
@click.argument("pattern")
@addresses_argument
@json_option
def sync(pattern: str, addresses: tuple[str, ...], as_json: bool) -> int:
    """Queue every tag, and every signature and the like, of the repositories that PATTERN and a rule match.

    For rules and remotes that are new, and for a remote that has lost something: what it has already costs
    one question each.
    """
    return _change(addresses, {"sync": pattern}, "syncing", as_json=as_json)


def _change(
    addresses: tuple[str, ...], change: dict[str, object], key: str, *, as_json: bool
) -> int:
    from swarmpull.registry.client import REPLICATION

    return change_queues_of(REPLICATION, addresses, change, key, as_json=as_json)


def _print_status(answers: Sequence[AdminAnswer]) -> None:
    from rich.console import Console

    from swarmpull.status import change_table, remote_table, rule_table

    console = Console()
    console.print(remote_table(answers))
    console.print(rule_table(answers))
    changes = change_table(answers)
    if changes.row_count:
        console.print(changes)
    for answer in answers:
        document = answer.document or {}
        for what, key in (("waits or is under way", "syncs"), ("failed", "sync_failure")):
            said = document.get(key)
            if said:
                text = said if isinstance(said, str) else ", ".join(map(str, said))
                click.echo(f"{answer.address}: sync {what}: {text}")
