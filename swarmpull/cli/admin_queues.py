"""What the commands about the queues of indexes share: whom they ask, what they print, how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from swarmpull.cli.options import (
    EXIT_FAILED,
    EXIT_UNAVAILABLE,
    admin_outcome,
    fail,
    local_admins,
    print_documents,
    read_admin_addresses,
)

if TYPE_CHECKING:
    from swarmpull.registry.client import AdminAnswer, AdminQueue

addresses_argument = click.argument(
    "addresses", nargs=-1, metavar="[HOST:PORT]...", callback=read_admin_addresses
)


def selection(**given: str | None) -> dict[str, object]:
    """What an operator chose of a queue, by the options that were given."""
    return {key: value for key, value in given.items() if value is not None}


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

    answers = run_command(partial(get_queues, queue, addresses or local_admins()))
    found = [answer for answer in answers if answer.document is not None]
    if as_json:
        print_documents(found)
    elif found:
        show(found)
    return admin_outcome(answers, addresses, queue.whose)


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
    answers = run_command(partial(get_queues, queue, addresses or local_admins()))
    asked = [answer.address for answer in answers if answer.document is not None]
    done = run_command(partial(change_queues, queue, asked, change))
    found = [answer for answer in done if answer.document is not None]
    if as_json:
        print_documents(found)
    else:
        for each in found:
            click.echo(f"{each.address}: {key} {(each.document or {}).get(key)}")
    refused = [each for each in done if each.document is None]
    if refused:
        is_unheard = any(each.is_unheard for each in refused)
        lines = (f"{each.address}: {each.failure}" for each in refused)
        return fail(EXIT_UNAVAILABLE if is_unheard else EXIT_FAILED, *lines)
    return admin_outcome(answers, addresses, queue.whose)
