"""``swarmpull status`` and ``swarmpull rates``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from swarmpull.cli.options import (
    EXIT_UNAVAILABLE,
    admin_outcome,
    fail,
    local_admins,
    print_documents,
    read_admin_addresses,
    read_rate,
)

if TYPE_CHECKING:
    from swarmpull.registry.client import AdminAnswer


@click.command()
@click.argument("addresses", nargs=-1, metavar="[HOST:PORT]...", callback=read_admin_addresses)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(addresses: tuple[str, ...], as_json: bool) -> int:
    """Show roles by their admin listeners: readiness, torrents, bytes by source.

    Without addresses, all that answer on 127.0.0.1, ports 7500 to 7599.
    """
    from swarmpull.registry.client import get_statuses
    from swarmpull.runtime import run_command

    answers = run_command(partial(get_statuses, addresses or local_admins()))
    found = [answer for answer in answers if answer.document is not None]
    if as_json:
        print_documents(found)
    elif found:
        _print_statuses(found)
    return admin_outcome(answers, addresses, "role")


def _print_statuses(answers: Sequence[AdminAnswer]) -> None:
    from rich.console import Console

    from swarmpull.status import role_table, torrent_table

    console = Console()
    console.print(role_table(answers))
    torrents = torrent_table(answers)
    if torrents.row_count:
        console.print(torrents)


@click.command()
@click.option(
    "--upload", callback=read_rate, metavar="RATE", help="Send no faster than that to peers."
)
@click.option("--download", callback=read_rate, metavar="RATE", help="Take no faster than that.")
@click.option(
    "--admin",
    "addresses",
    multiple=True,
    metavar="URL",
    callback=read_admin_addresses,
    help="Admin listener of an agent or origin; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rates(
    upload: float | None, download: float | None, addresses: tuple[str, ...], as_json: bool
) -> int:
    """Show or change the rates of agents and origins until they are started again.

    RATE is like 100MB/s, or unlimited. Without --admin, of all that answer on 127.0.0.1, ports 7500 to
    7599.
    """
    from swarmpull.registry.client import get_rates, put_rates
    from swarmpull.runtime import run_command

    answers = run_command(partial(get_rates, addresses or local_admins()))
    found = [answer for answer in answers if answer.document is not None]
    refused: list[AdminAnswer] = []
    given = {"upload_rate": upload, "download_rate": download}
    change = {
        key: None if rate == math.inf else rate for key, rate in given.items() if rate is not None
    }
    if change and found:
        done = run_command(partial(put_rates, [answer.address for answer in found], change))
        found = [answer for answer in done if answer.document is not None]
        refused = [answer for answer in done if answer.document is None]
    _print_rates(found, as_json=as_json)
    status = admin_outcome(answers, addresses, "agent or origin")
    if refused:
        return fail(EXIT_UNAVAILABLE, *(f"{each.address}: {each.failure}" for each in refused))
    return status


def _print_rates(answers: Sequence[AdminAnswer], *, as_json: bool) -> None:
    if as_json:
        print_documents(answers)
    elif answers:
        from rich.console import Console

        from swarmpull.status import rate_table

        Console().print(rate_table(answers))
