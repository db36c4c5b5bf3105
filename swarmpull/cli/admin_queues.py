"""What the commands about the queues of indexes share: whom they ask, what they print, how they end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from swarmpull.cli import options
from swarmpull.cli.options import EXIT_FAILED, EXIT_UNAVAILABLE, fail, read_admin_addresses

if TYPE_CHECKING:
    from swarmpull.registry.client import AdminAnswer, AdminQueue

addresses_argument = click.argument(
    "addresses", nargs=-1, metavar="[HOST:PORT]...", callback=read_admin_addresses
)


def show_queues(
    queue: AdminQueue,
    addresses: tuple[str, ...],
    show: Callable[[Sequence[AdminAnswer]], None],
    *,
    as_json: bool,
) -> int:
    """Print what is in a queue of each index, as JSON or by ``show``; returns the exit status."""
    from swarmpull.registry.client import get_queues
    from swarmpull.runtime import run_command

    answers = run_command(partial(get_queues, queue, addresses or _local()))
    found = [answer for answer in answers if answer.document is not None]
    if as_json:
        _print_json(found)
    elif found:
        show(found)
    return _outcome(queue, answers, addresses)


def change_queues_of(
    queue: AdminQueue,
    addresses: tuple[str, ...],
    change: dict[str, object],
    key: str,
    *,
    as_json: bool,
) -> int:
    """Ask for a change and print what became of it, which the answers have under ``key``."""
    from swarmpull.registry.client import change_queues, get_queues
    from swarmpull.runtime import run_command

    # Who has no such queue is not to be asked to change anything.
    answers = run_command(partial(get_queues, queue, addresses or _local()))
    asked = [answer.address for answer in answers if answer.document is not None]
    done = run_command(partial(change_queues, queue, asked, change))
    found = [answer for answer in done if answer.document is not None]
    if as_json:
        _print_json(found)
    else:
        for each in found:
            click.echo(f"{each.address}: {key} {(each.document or {}).get(key)}")
    refused = [each for each in done if each.document is None]
    if refused:
        is_unheard = any(each.is_unheard for each in refused)
        lines = (f"{each.address}: {each.failure}" for each in refused)
        return fail(EXIT_UNAVAILABLE if is_unheard else EXIT_FAILED, *lines)
    return _outcome(queue, answers, addresses)


def _print_json(found: Sequence[AdminAnswer]) -> None:
    documents = [{"address": each.address, **(each.document or {})} for each in found]
    click.echo(json.dumps(documents, indent=2))


def _local() -> tuple[str, ...]:
    return tuple(f"127.0.0.1:{port}" for port in options.ADMIN_PORTS)


def _outcome(queue: AdminQueue, answers: Sequence[AdminAnswer], addresses: Sequence[str]) -> int:
    """The exit status, with a line for each that should have answered and did not."""
    failed = [each for each in answers if each.document is None and (addresses or each.is_unheard)]
    if failed:
        return fail(EXIT_UNAVAILABLE, *(f"{each.address}: {each.failure}" for each in failed))
    if any(each.document is not None for each in answers):
        return 0
    ports = f"{options.ADMIN_PORTS[0]} to {options.ADMIN_PORTS[-1]}"
    nobody = f"no {queue.whose} answers on 127.0.0.1, ports {ports}: name its admin listener"
    return fail(EXIT_UNAVAILABLE, nobody)
