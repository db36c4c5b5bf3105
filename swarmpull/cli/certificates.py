"""``swarmpull certs``."""

from __future__ import annotations

from pathlib import Path

import click

from swarmpull.cli.options import ROLES, role_set


@click.group()
def certs() -> None:
    """Make the certificates with which roles trust each other, and take them back: docs/security.md."""


_certs_option = click.option(
    "--dir",
    "directory",
    metavar="DIR",
    default="swarmpull-certs",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the authority is, and what it issues.",
)
_force_option = click.option("--force", is_flag=True, help="Replace files that are there.")


@certs.command("init")
@_certs_option
@click.option("--cluster", default="swarmpull", show_default=True, help="Name of the cluster.")
@click.option("--days", type=int, default=3650, show_default=True, help="How long it counts.")
@_force_option
def certs_init(directory: Path, cluster: str, days: int, force: bool) -> None:
    """Make the authority of a cluster: ca.crt for all hosts, ca.key to be kept where you issue."""
    from swarmpull.certificates import create_authority

    written = create_authority(directory, cluster, days=days, force=force)
    click.echo(f"{written.certificate}  {written.key}")


@certs.command("issue")
@click.argument("name")
@_certs_option
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([*ROLES, "client", "all"]),
    help="What the holder may be; may be repeated. 'all' are the four roles.",
)
@click.option("--dns", multiple=True, metavar="HOST", help="Name of an HTTPS listener.")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="Address of one.")
@click.option("--days", type=int, default=365, show_default=True, help="How long it counts.")
@_force_option
def certs_issue(
    name: str,
    directory: Path,
    roles: tuple[str, ...],
    dns: tuple[str, ...],
    ips: tuple[str, ...],
    days: int,
    force: bool,
) -> None:
    """Make NAME.crt and NAME.key for one host."""
    from swarmpull.certificates import issue

    meant = frozenset(roles) - {"all"} | (role_set(roles) if "all" in roles else frozenset())
    written = issue(directory, name, meant, dns=dns, ips=ips, days=days, force=force)
    click.echo(f"{written.certificate}  {written.key}")


@certs.command("revoke")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_certs_option
@click.option("--serial", "serials", multiple=True, metavar="HEX", help="Of one without a file.")
def certs_revoke(names: tuple[str, ...], directory: Path, serials: tuple[str, ...]) -> None:
    """Take certificates back: those of NAME.crt, or of files, go into ca.crl for all hosts (tls.crl).

    Without any it makes the list, with nothing in it.
    """
    from swarmpull.certificates import revoke

    click.echo(revoke(directory, names, serials))
