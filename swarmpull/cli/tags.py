"""``swarmpull tags``."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar

import click

from swarmpull.cli.options import (
    DEFAULT_REGISTRY,
    json_option,
    login_of,
    password_option,
    print_table,
    read_image,
    read_repository,
    registry_of,
    registry_option,
    user_option,
)

if TYPE_CHECKING:
    from swarmpull.registry.client import RegistryClient
    from swarmpull.registry.http import Login
    from swarmpull.registry.layouts import ImageName
    from swarmpull.registry.tag_listing import HistoryEntry

_T = TypeVar("_T")


@click.group()
def tags() -> None:
    """List the tags of a repository, and see what became of one."""


@tags.command("ls")
@click.argument("repository", metavar="NAME", callback=read_repository)
@registry_option
@user_option
@password_option
@json_option
def tags_ls(
    repository: ImageName,
    registry: str | None,
    user: str | None,
    password_file: IO[str] | None,
    as_json: bool,
) -> None:
    """List the tags of a repository."""
    login = login_of(user, password_file)
    where = registry_of(repository, registry)
    names = _ask(partial(_list, repository.repository, as_json), where, login)
    if as_json:
        click.echo(json.dumps({"name": repository.repository, "tags": names}, indent=2))


async def _list(repository: str, keep: bool, client: RegistryClient) -> list[str]:
    """Print the tags as they come, or ``keep`` them."""
    from swarmpull.registry.tag_listing import tag_pages

    names: list[str] = []
    async for page in tag_pages(client, repository):
        if keep:
            names += page
        elif page:
            click.echo("\n".join(page))
    return names


@tags.command("log")
@click.argument("image", metavar="NAME[:TAG]", callback=read_image)
@registry_option
@user_option
@password_option
@json_option
def tags_log(
    image: ImageName,
    registry: str | None,
    user: str | None,
    password_file: IO[str] | None,
    as_json: bool,
) -> None:
    """Show the last changes of a tag, the latest first: when, from where, which digest.

    Also of a tag that was deleted.
    """
    if ":" in image.reference:
        raise click.UsageError("A digest has no history: name a tag.")
    from swarmpull.registry.tag_listing import tag_history

    async def ask(client: RegistryClient) -> list[HistoryEntry]:
        return await tag_history(client, image.repository, image.reference)

    entries = _ask(ask, registry_of(image, registry), login_of(user, password_file))
    if as_json:
        click.echo(json.dumps([_document(entry) for entry in entries], indent=2))
    else:
        _print(entries)


def _document(entry: HistoryEntry) -> dict[str, str | int | None]:
    return {
        "time": entry.moment,
        "time_ns": entry.time,
        "source": entry.source,
        "digest": entry.digest,
        "by": entry.by,
    }


def _print(entries: list[HistoryEntry]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("TIME", "DIGEST", "INDEX", "BY"):
        table.add_column(name, no_wrap=True)
    for entry in entries:
        table.add_row(entry.moment, entry.digest or "(deleted)", entry.source, entry.by)
    print_table(table)


def _ask(
    question: Callable[[RegistryClient], Awaitable[_T]], registry: str | None, login: Login | None
) -> _T:
    from swarmpull.registry.client import open_client
    from swarmpull.runtime import run_command

    async def command() -> _T:
        async with open_client(registry or DEFAULT_REGISTRY, login=login) as client:
            return await question(client)

    return run_command(command)
