"""``swarmpull store``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmpull.cli.options import (
    EXIT_FAILED,
    json_option,
    load_config,
    print_table,
    read_digest,
)

if TYPE_CHECKING:
    from swarmpull.digest import Digest


@click.group()
def store() -> None:
    """Look into the data directory of an agent or origin, clean it, check it."""


_store_option = click.option(
    "--data-dir",
    "directory",
    metavar="DIR",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Of one agent or origin, such as swarmpull-data/agent.",
)


@store.command("ls")
@_store_option
@json_option
def store_ls(directory: Path, as_json: bool) -> None:
    """List blobs, and partials with the pieces that they have."""
    from swarmpull.storage import stored_document, stored_table
    from swarmpull.store.offline import find_store, list_store

    found = list_store(find_store(directory))
    if as_json:
        click.echo(json.dumps([stored_document(stored) for stored in found], indent=2))
    else:
        print_table(stored_table(found))


@store.command("rm")
@click.argument("digest", metavar="DIGEST", callback=read_digest)
@_store_option
@json_option
def store_rm(digest: Digest, directory: Path, as_json: bool) -> None:
    """Remove a blob and what there is of a download of it; not while a process has the directory."""
    from swarmpull.storage import stored_document, stored_table
    from swarmpull.store.offline import delete, find_store

    removed = delete(find_store(directory), digest)
    if as_json:
        click.echo(json.dumps([stored_document(stored) for stored in removed], indent=2))
    else:
        print_table(stored_table(removed))


@store.command("gc")
@_store_option
@click.option(
    "--role",
    type=click.Choice(["agent", "origin"]),
    help="Whose limits, the keys under agent.store or origin.store; must be whose directory it is.  "
    "[default: as the directory says]",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@click.option(
    "--config",
    "file",
    envvar="SWARMPULL_CONFIG",
    type=click.Path(path_type=Path),
    help="TOML file; else the one that SWARMPULL_CONFIG names, else none.",
)
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one key.")
@json_option
def store_gc(
    directory: Path,
    role: str | None,
    dry_run: bool,
    file: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Remove what the limits say, as a running process does once a minute.

    Not while a process has the directory; --dry-run is possible even then.
    """
    loaded = load_config((), file, None, None, overrides)
    from swarmpull.roles.role_store import limits_of
    from swarmpull.storage import removal_document, removal_table
    from swarmpull.store.offline import collect, find_store, plan_removals, role_of

    root = find_store(directory)
    owner = role_of(root)
    if role not in (None, owner):
        raise click.UsageError(
            f"{root} is the data directory of an {owner}, not of an {role}: leave out --role."
        )
    limits = limits_of(owner, root, getattr(loaded.config, owner).store)
    removals = plan_removals(root, limits) if dry_run else collect(root, limits)
    if as_json:
        click.echo(json.dumps([removal_document(removal) for removal in removals], indent=2))
    elif removals:
        print_table(removal_table(removals))
    else:
        click.echo("Nothing is to be removed.")


@store.command("verify")
@_store_option
@click.option(
    "--delete", is_flag=True, help="Remove what is wrong; not while a process runs there."
)
@json_option
def store_verify(directory: Path, delete: bool, as_json: bool) -> int:
    """Hash every blob and every stored piece; the exit status is 1 if one is wrong."""
    from swarmpull.storage import checked_document, checked_line, checked_summary
    from swarmpull.store.offline import find_store, verify, verify_and_repair

    root = find_store(directory)
    found = []
    for checked in verify_and_repair(root) if delete else verify(root):
        found.append(checked)
        if checked.problem and not as_json:
            click.echo(checked_line(checked))
    wrong = any(checked.problem for checked in found)
    if as_json:
        click.echo(json.dumps([checked_document(checked) for checked in found], indent=2))
    else:
        click.echo(checked_summary(found, removing=delete))
    return EXIT_FAILED if wrong else 0
