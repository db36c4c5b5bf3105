"""``swarmpull replication``: what other clusters were not told of yet, and having it tried again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from swarmpull.cli import options
from swarmpull.cli.options import EXIT_FAILED, EXIT_UNAVAILABLE, fail, read_admin_addresses

if TYPE_CHECKING:
    from swarmpull.registry.client import AdminAnswer

_addresses = click.argument(
    "addresses", nargs=-1, metavar="[HOST:PORT]...", callback=read_admin_addresses
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def replication() -> None:
    """See and hurry what indexes replicate to other clusters.

    Indexes are named by their admin listeners; without any, those on 127.0.0.1, ports 7500 to 7599.
    """


@replication.command()
@_addresses
@_json
def status(addresses: tuple[str, ...], as_json: bool) -> int:
    """Show the queue for each remote cluster, how far each copy is, and why what fails does."""
    from swarmpull.registry.client import get_replications
    from swarmpull.runtime import run_command

    answers = run_command(partial(get_replications, addresses or _local()))
    found = [answer for answer in answers if answer.document is not None]
    if as_json:
        documents = [{"address": each.address, **(each.document or {})} for each in found]
        click.echo(json.dumps(documents, indent=2))
    elif found:
        _print_status(found)
    return _outcome(answers, addresses)


@replication.command()
@_addresses
@click.option("--remote", help="Only what goes to that remote.")
@click.option("--repository", help="Only of that repository.")
@click.option("--tag", help="Only that tag, or what has no tag by its digest.")
@_json
def retry(
    addresses: tuple[str, ...],
    remote: str | None,
    repository: str | None,
    tag: str | None,
    as_json: bool,
) -> int:
    """Try what waits at once, also what was set aside because it could not succeed."""
    given = {"remote": remote, "repository": repository, "tag": tag}
    wanted = {key: value for key, value in given.items() if value is not None}
    return _change(addresses, {"retry": wanted}, "retried", as_json=as_json)


@replication.command()
@click.argument("pattern")
@_addresses
@_json
def sync(pattern: str, addresses: tuple[str, ...], as_json: bool) -> int:
    """Queue every tag, and every signature and the like, of the repositories that PATTERN and a rule match.

    For rules and remotes that are new, and for a remote that has lost something: what it has already costs
    one question each.
    """
    return _change(addresses, {"sync": pattern}, "syncing", as_json=as_json)


def _change(
    addresses: tuple[str, ...], change: dict[str, object], key: str, *, as_json: bool
) -> int:
    """Ask for a change and print what became of it, which the answers have under ``key``."""
    from swarmpull.registry.client import change_replications, get_replications
    from swarmpull.runtime import run_command

    # Who is no index that replicates is not to be asked to change anything.
    answers = run_command(partial(get_replications, addresses or _local()))
    asked = [answer.address for answer in answers if answer.document is not None]
    done = run_command(partial(change_replications, asked, change))
    found = [answer for answer in done if answer.document is not None]
    if as_json:
        documents = [{"address": each.address, **(each.document or {})} for each in found]
        click.echo(json.dumps(documents, indent=2))
    else:
        for each in found:
            click.echo(f"{each.address}: {key} {(each.document or {}).get(key)}")
    refused = [each for each in done if each.document is None]
    if refused:
        is_unheard = any(each.is_unheard for each in refused)
        lines = (f"{each.address}: {each.failure}" for each in refused)
        return fail(EXIT_UNAVAILABLE if is_unheard else EXIT_FAILED, *lines)
    return _outcome(answers, addresses)


def _local() -> tuple[str, ...]:
    return tuple(f"127.0.0.1:{port}" for port in options.ADMIN_PORTS)


def _outcome(answers: Sequence[AdminAnswer], addresses: Sequence[str]) -> int:
    """The exit status, with a line for each that should have answered and did not."""
    failed = [each for each in answers if each.document is None and (addresses or each.is_unheard)]
    if failed:
        return fail(EXIT_UNAVAILABLE, *(f"{each.address}: {each.failure}" for each in failed))
    if any(each.document is not None for each in answers):
        return 0
    ports = f"{options.ADMIN_PORTS[0]} to {options.ADMIN_PORTS[-1]}"
    nobody = (
        f"no index that replicates answers on 127.0.0.1, ports {ports}: name its admin listener"
    )
    return fail(EXIT_UNAVAILABLE, nobody)


def _print_status(answers: Sequence[AdminAnswer]) -> None:
    from rich.console import Console

    from swarmpull.status import change_table, remote_table, rule_table

    console = Console()
    console.print(remote_table(answers))
    console.print(rule_table(answers))
    changes = change_table(answers)
    if changes.row_count:
        console.print(changes)
